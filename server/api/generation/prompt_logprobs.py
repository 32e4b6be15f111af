"""Prompt logprobs in an answer: in OpenAI's lists, with `echo`, and in vLLM's `prompt_logprobs`.

Both begin with null: nothing comes before a prompt's first token.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from server.api.generation.detokenizer import detokenizer
from server.api.generation.generation import Generation
from server.api.generation.json_objects import finite, top_logprobs
from server.api.generation.prompts import off_loop
from server.base_model.tokenizer import Tokenizer
from server.messages import PromptLogprobs

T = TypeVar("T")


class TokenScore(NamedTuple):
    """A token of a prompt: its logprob, its rank (1: the likeliest), and (id, logprob) of the best tokens."""

    token: int
    logprob: float
    rank: int
    best: list[tuple[int, float]]


def token_scores(prompt: Sequence[int], parts: Sequence[PromptLogprobs], count: int) -> Iterator[TokenScore]:
    """The scores of the tokens after the first, each with the `count` best or fewer."""
    tokens = iter(prompt[1:])
    for part in parts:
        logprobs, ranks = array("f", part.logprobs), array("i", part.ranks)
        ids, best = array("i", part.top_ids), array("f", part.top_logprobs)
        k = len(ids) // len(logprobs)
        for i, (token, logprob, rank) in enumerate(zip(tokens, logprobs, ranks, strict=False)):
            shown = slice(i * k, i * k + min(count, k))
            yield TokenScore(token, logprob, rank, list(zip(ids[shown], best[shown], strict=True)))


async def echo_logprobs(generation: Generation, number: int, echo: str, count: int) -> dict[str, list[Any]]:
    """As `completion_logprobs`, of the prompt `number`, whose text is `echo`."""
    return await _render(generation, number, count, partial(_echo_logprobs, echo=echo))


async def vllm_prompt_logprobs(generation: Generation, number: int, count: int) -> list[Any]:
    """For each token of the prompt `number` null or, by id, the logprob, rank and text of the token itself
    and of the `count` best.
    """
    return await _render(generation, number, count, _vllm_prompt_logprobs)


async def _render(generation: Generation, number: int, count: int, render: Callable[..., T]) -> T:
    prompt, deps = generation.prompts[number], generation.deps
    parts = generation.prompt_logprobs.get(number, [])
    work = partial(render, deps.tokenizer, prompt, parts, count)
    return await off_loop(deps, generation.rows[0].tenant, len(prompt) * (1 + count), work)


def _echo_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], parts: Sequence[PromptLogprobs], count: int, *, echo: str
) -> dict[str, list[Any]]:
    scores = list(token_scores(prompt, parts, count))
    tops = (top_logprobs(tokenizer, score.token, score.logprob, score.best) for score in scores)
    return {
        "text_offset": _offsets(tokenizer, prompt, echo),
        "token_logprobs": [None, *(finite(score.logprob) for score in scores)],
        "tokens": [tokenizer.token_text(token)[0] for token in prompt],
        "top_logprobs": [None, *map(_encoded, tops)],
    }


def _vllm_prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], parts: Sequence[PromptLogprobs], count: int
) -> list[Any]:
    def shown(token: int, logprob: float, rank: int) -> dict[str, Any]:
        text = tokenizer.token_text(token)[0]
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text}

    objects: list[Any] = [None]
    for score in token_scores(prompt, parts, count):
        best = {id_: shown(id_, logprob, rank) for rank, (id_, logprob) in enumerate(score.best, 1)}
        own = {score.token: shown(score.token, score.logprob, score.rank)}
        objects.append(_encoded(own | best | own))
    return objects


def _offsets(tokenizer: Tokenizer, prompt: Sequence[int], echo: str) -> list[int]:
    """Characters of `echo` before each token; special tokens have none."""
    decoder, offsets, length = detokenizer(tokenizer), [], 0
    for token in prompt:
        offsets.append(length)
        length += len(decoder.push(token))
    added = length + len(decoder.flush()) - len(echo)  # the space that SentencePiece puts before a text
    return [max(0, offset - added) for offset in offsets] if added == 1 else offsets


def _encoded(value: object) -> msgspec.Raw:
    """`value` as JSON: a tenth of the bytes that the objects take."""
    return msgspec.Raw(msgspec.json.encode(value))
