"""OpenAI's JSON objects that both routes need: usage, and logprobs in two formats.

The logprobs of completions are parallel lists; those of chat are one object for each token.
"""

from typing import Any

from server.api.generation.choice import TokenInfo
from server.api.generation.generation import Usage
from server.base_model.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks, as at OpenAI


def completion_logprobs(tokenizer: Tokenizer, tokens: list[TokenInfo], count: int) -> dict[str, list[Any]]:
    """Parallel lists. `top_logprobs` holds the `count` best tokens and the chosen one, by their texts."""

    def text(token: int) -> str:
        return tokenizer.token_text(token)[0]

    tops = []
    for info in tokens:
        best = {text(token): _number(logprob) for token, logprob in info.logprobs.top[:count]}
        tops.append({text(info.token): _number(info.logprobs.logprob)} | best)
    return {
        "text_offset": [info.offset for info in tokens],
        "token_logprobs": [_number(info.logprobs.logprob) for info in tokens],
        "tokens": [text(info.token) for info in tokens],
        "top_logprobs": tops,
    }


def add_logprobs(total: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any] | None:
    """`total` with the lists of `new` appended, in either format."""
    if total is None or new is None:
        return total or new
    for key, values in new.items():
        if isinstance(values, list):
            total[key].extend(values)
    return total


def chat_logprobs(tokenizer: Tokenizer, tokens: list[TokenInfo], count: int) -> dict[str, Any]:
    """An object for each token, with the `count` best in its place."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        text, raw = tokenizer.token_text(token)
        return {"token": text, "logprob": _number(logprob), "bytes": list(raw)}

    content = [
        shown(info.token, info.logprobs.logprob)
        | {"top_logprobs": [shown(token, logprob) for token, logprob in info.logprobs.top[:count]]}
        for info in tokens
    ]
    return {"content": content, "refusal": None}


def _number(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
