"""POST /v1/chat/completions, in OpenAI's shape."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from server.api.generation.chat_bodies import ChatBody
from server.api.generation.choice import Piece
from server.api.generation.engine_requests import RouteOptions, build_generation
from server.api.generation.generation import Generation
from server.api.generation.json_objects import add_logprobs, chat_logprobs, usage_object
from server.api.generation.model_selection import resolve
from server.api.generation.prompt_logprobs import vllm_prompt_logprobs
from server.api.generation.prompts import chat_prompt, kept_tokens, last
from server.api.http.dependencies import CurrentTenant, Deps, current_tenant, sticky_key
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body
from server.api.http.rate_limits import rate_limited
from server.api.http.streaming import open_stream, while_connected
from server.api.schema.objects import STREAM, ChatCompletion
from server.api.structured_output.response_format import schema_of
from server.api.structured_output.structured_grammar import structured_grammar
from server.api.tools.answer import Answer, AnswerWithCalls, Delta, TextAnswer, add_delta
from server.api.tools.answer_grammar import answer_grammar
from server.api.tools.tool_use import ToolUse, tool_use

OPENING: Delta = {"role": "assistant", "refusal": None, "content": None}  # of a choice's first delta
router = APIRouter(dependencies=[Depends(current_tenant), Depends(rate_limited)])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
async def create_chat_completion(
    request: Request,
    deps: Deps,
    tenant: CurrentTenant,
    body: Annotated[ChatBody, Depends(json_body(ChatBody))],
) -> Response:
    """One object with all choices, or a stream of chunks."""
    use = tool_use(body)
    target = await resolve(deps, tenant, body.model, body.adapters, sticky_key(request, body.user))
    max_tokens = body.max_completion_tokens or body.max_tokens
    prompt = await chat_prompt(
        deps,
        tenant,
        body.messages,
        use.shown if use else None,
        answer=body.add_generation_prompt,
        open_end=body.continue_final_message,
    )
    keep = kept_tokens(body.truncate_prompt_tokens, deps.max_context, max_tokens)
    structure = await structured_grammar(body.structure) or await schema_of(body.response_format)
    options = RouteOptions(
        prefix="chatcmpl",
        prompts=[last(prompt, keep)],
        max_tokens=max_tokens,
        default_max_tokens=None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=await answer_grammar(use, structure, deps.tokenizer),
        with_calls=use is not None,
    )
    generation = await build_generation(deps, tenant, request, target, body, options)
    answer = _Chat(generation, body, use, constrained=options.grammar is not None)
    if body.stream:
        return await open_stream(request, answer.events(), target.headers, deadline=generation.deadline)
    return json_response(await while_connected(request.receive, answer.full_object()), headers=target.headers)


class _Chat:
    """Renders a generation as `chat.completion` and `chat.completion.chunk` objects."""

    def __init__(
        self, generation: Generation, body: ChatBody, use: ToolUse | None, *, constrained: bool
    ) -> None:
        """`use`: functions that may be called; `constrained`: a grammar holds the answer to their format."""
        self._generation = generation
        self._body = body
        format_ = generation.deps.tokenizer.tools.format
        self._answers: list[Answer] = [
            TextAnswer() if use is None else AnswerWithCalls(format_, use, constrained=constrained)
            for _ in generation.choices
        ]

    async def full_object(self) -> dict[str, Any]:
        """The answer without streaming, once every choice has finished."""
        answers = [self._empty(choice.index) for choice in self._generation.choices]
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                answer = answers[piece.index]
                for delta in self._deltas(piece):
                    add_delta(answer["message"], delta)
                answer["logprobs"] = add_logprobs(answer["logprobs"], self._logprobs(piece))
                answer["finish_reason"] = self._finish(piece)
        for answer in answers:
            if not answer["message"].keys() & {"tool_calls", "function_call"}:
                answer["message"]["content"] = answer["message"]["content"] or ""
        whole = self._object("chat.completion", answers) | {"usage": usage_object(self._generation.usage)}
        if (count := self._body.prompt_logprobs) is not None:
            whole["prompt_logprobs"] = await vllm_prompt_logprobs(self._generation, 0, count)
        return whole

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer's chunks, with the usage in the last if the body asks for it."""
        stream_options = self._body.stream_options
        with_usage = stream_options is not None and stream_options.include_usage
        continuous = stream_options is not None and stream_options.continuous_usage_stats
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        begun: set[int] = set()  # choices whose role has been sent
        async with aclosing(self._generation.pieces()) as pieces:
            async for piece in pieces:
                if extra and continuous:
                    extra = {"usage": usage_object(self._generation.usage)}
                deltas = self._deltas(piece)
                if piece.index not in begun and (deltas or piece.tokens or piece.finish is not None):
                    begun.add(piece.index)
                    deltas = [OPENING | (deltas[0] if deltas else {"content": ""}), *deltas[1:]]
                logprobs = self._logprobs(piece)  # of all the piece's tokens, in its first chunk
                for delta in deltas or ([{}] if piece.tokens else []):
                    yield self._chunk(piece.index, delta, logprobs, None) | extra
                    logprobs = None
                if piece.finish is not None:  # alone in a chunk, as OpenAI has it: clients rely on that
                    yield self._chunk(piece.index, {}, None, self._finish(piece)) | extra
        if with_usage:
            usage = usage_object(self._generation.usage)
            yield self._object("chat.completion.chunk", []) | {"usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._generation.id,
            "object": kind,
            "created": self._generation.created,
            "model": self._generation.target.model,
            "system_fingerprint": self._generation.target.fingerprint,
            "choices": choices,
        }

    def _empty(self, index: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": None, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": None}

    def _deltas(self, piece: Piece) -> list[Delta]:
        return self._answers[piece.index].deltas(piece.text, last=piece.finish is not None)

    def _finish(self, piece: Piece) -> str | None:
        return piece.finish and self._answers[piece.index].finish_reason(piece.finish)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._generation.deps.tokenizer, piece.tokens, self._body.top_logprobs or 0)
