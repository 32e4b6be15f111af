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
from server.api.generation.likelihood import Likelihood, likeliest
from server.api.generation.model_selection import resolve
from server.api.generation.prompt_logprobs import echo_logprobs, vllm_prompt_logprobs
from server.api.generation.prompts import completion_prompts, kept_tokens
from server.api.http.dependencies import CurrentTenant, Deps, current_tenant, sticky_key
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.rate_limits import rate_limited
from server.api.http.streaming import open_stream, while_connected
from server.api.schema.objects import STREAM, Completion
from server.api.structured_output.structured_grammar import structured_grammar

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter(dependencies=[Depends(current_tenant), Depends(rate_limited)])


@router.post("/v1/completions", response_model=Completion, responses=STREAM)
async def create_completion(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
) -> Response:
    """One object with all choices, or a stream of them."""
    target = await resolve(deps, tenant, body.model, body.adapters, sticky_key(request, body.user))
    keep = kept_tokens(body.truncate_prompt_tokens, deps.max_context, body.max_tokens or DEFAULT_MAX_TOKENS)
    ranked = body.best_of is not None and body.best_of > body.n
    echoed = body.logprobs if body.echo else None
    options = RouteOptions(
        prefix="cmpl",
        prompts=await completion_prompts(deps, tenant, body.prompt, keep, special=body.add_special_tokens),
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        prompt_logprobs=max((k for k in (echoed, body.prompt_logprobs) if k is not None), default=None),
        shows_end=echoed is not None,
        grammar=await structured_grammar(body.structure),
        best_of=body.best_of if ranked else None,
    )
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
        self._echoes = [self._echo(i) if body.echo else "" for i in range(len(generation.prompts))]
        self._unechoed = set(range(len(generation.choices))) if body.echo else set[int]()

    async def full_object(self) -> dict[str, Any]:
        """The answer without streaming, once every choice has finished."""
        choices = [self._choice(i, "") for i in range(len(self._generation.choices))]
        likelihoods = [Likelihood() for _ in choices]
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                choice = choices[piece.index]
                text, logprobs = await self._echoed(piece)
                choice["text"] += text
                choice["logprobs"] = add_logprobs(choice["logprobs"], logprobs)
                choice["finish_reason"] = piece.finish
                likelihoods[piece.index].add(piece)
        if (count := self._body.prompt_logprobs) is not None:
            for i, choice in enumerate(choices):
                number = i // self._generation.n
                choice["prompt_logprobs"] = await vllm_prompt_logprobs(self._generation, number, count)
        choices = likeliest(choices, likelihoods, self._generation.n, self._body.n)
        return self._object(choices) | {"usage": usage_object(self._generation.usage)}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's chunks, with the usage in the last if the body asks for it."""
        stream_options = self._body.stream_options
        with_usage = stream_options is not None and stream_options.include_usage
        continuous = stream_options is not None and stream_options.continuous_usage_stats
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                if extra and continuous:
                    extra = {"usage": usage_object(self._generation.usage)}
                text, logprobs = await self._echoed(piece)
                if text or piece.tokens:
                    yield self._object([self._choice(piece.index, text, logprobs)]) | extra
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

    async def _echoed(self, piece: Piece) -> tuple[str, dict[str, list[Any]] | None]:
        """Text and logprobs of a piece; with `echo`, those of its prompt come before a choice's first."""
        number = piece.index // self._generation.n
        echo, logprobs = self._echoes[number], None
        if (count := self._body.logprobs) is not None:
            tokenizer = self._generation.deps.tokenizer
            logprobs = completion_logprobs(tokenizer, piece.tokens, count, len(echo))
        if piece.index not in self._unechoed:
            return piece.text, logprobs
        self._unechoed.remove(piece.index)
        if count is not None:
            logprobs = add_logprobs(await echo_logprobs(self._generation, number, echo, count), logprobs)
        return echo + piece.text, logprobs

    def _echo(self, number: int) -> str:
        """The text of a prompt: as it was sent, or decoded from token ids."""
        prompt = self._body.prompt
        sent = [prompt] if isinstance(prompt, str) else prompt
        cut = self._body.truncate_prompt_tokens is not None
        if cut or isinstance(sent[0], int) or isinstance(sent[number], list):
            return self._generation.deps.tokenizer.decode(self._generation.prompts[number])
        return str(sent[number])
