"""POST /v1/completions, in OpenAI's shape."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from server.api.generation.bodies import CompletionBody
from server.api.generation.choice import Piece
from server.api.generation.engine_requests import RouteOptions, build_generation
from server.api.generation.generation import Generation
from server.api.generation.json_objects import add_logprobs, completion_logprobs, usage_object
from server.api.generation.model_selection import resolve
from server.api.generation.prompts import completion_prompts
from server.api.http.dependencies import CurrentTenant, Deps, current_tenant, sticky_key
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.rate_limits import rate_limited
from server.api.http.streaming import open_stream, while_connected

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter(dependencies=[Depends(current_tenant), Depends(rate_limited)])


@router.post("/v1/completions")
async def create_completion(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
) -> Response:
    """One object with all choices, or a stream of them."""
    target = await resolve(deps, tenant, body.model, body.adapters, sticky_key(request, body.user))
    prompts = await completion_prompts(deps, tenant, body.prompt)
    options = RouteOptions("cmpl", prompts, body.max_tokens, DEFAULT_MAX_TOKENS, body.logprobs)
    generation = await build_generation(deps, tenant, request, target, body, options)
    answer = _Completion(generation, body)
    if body.stream:
        return await open_stream(request, answer.events(), target.headers, deadline=generation.deadline)
    return json_response(await while_connected(request.receive, answer.full_object()), headers=target.headers)


class _Completion:
    """Renders a generation as `text_completion` objects."""

    def __init__(self, generation: Generation, body: CompletionBody) -> None:
        self._generation = generation
        self._body = body
        self._echoes = [""] * len(generation.choices)
        if body.echo:
            self._echoes = [self._echo(i // generation.n) for i in range(len(generation.choices))]

    async def full_object(self) -> dict[str, Any]:
        """The answer without streaming, once every choice has finished."""
        choices = [self._choice(i, echo) for i, echo in enumerate(self._echoes)]
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                choice = choices[piece.index]
                choice["text"] += piece.text
                choice["logprobs"] = add_logprobs(choice["logprobs"], self._logprobs(piece))
                choice["finish_reason"] = piece.finish
        return self._object(choices) | {"usage": usage_object(self._generation.usage)}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's chunks, with the usage in the last if the body asks for it."""
        stream_options = self._body.stream_options
        with_usage = stream_options is not None and stream_options.include_usage
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                echo, self._echoes[piece.index] = self._echoes[piece.index], ""
                if piece.text or piece.tokens or echo:
                    choice = self._choice(piece.index, echo + piece.text, self._logprobs(piece))
                    yield self._object([choice]) | extra
                if piece.finish is not None:  # alone in a chunk, as OpenAI has it: clients rely on that
                    yield self._object([self._choice(piece.index, "", finish=piece.finish)]) | extra
        if with_usage:
            yield self._object([]) | {"usage": usage_object(self._generation.usage)}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "object": "text_completion",
            "created": self._generation.created,
            "model": self._generation.target.model,
            "system_fingerprint": self._generation.target.fingerprint,
            "choices": choices,
        }

    def _choice(
        self, index: int, text: str, logprobs: dict[str, list[Any]] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, piece: Piece) -> dict[str, list[Any]] | None:
        if self._body.logprobs is None:
            return None
        return completion_logprobs(self._generation.deps.tokenizer, piece.tokens, self._body.logprobs)

    def _echo(self, number: int) -> str:
        """The text of a prompt: as it was sent, or decoded from token ids."""
        prompt = self._body.prompt
        sent = [prompt] if isinstance(prompt, str) else prompt
        if isinstance(sent[0], int) or isinstance(sent[number], list):
            return self._generation.deps.tokenizer.decode(self._generation.prompts[number])
        return str(sent[number])
