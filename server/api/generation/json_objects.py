"""OpenAI's JSON objects that both routes need: usage, and logprobs in two formats.

The logprobs of completions are parallel lists; those of chat are one object for each token.
"""

from typing import Any

from server.api.generation.choice import TokenInfo
from server.api.generation.generation import Usage
from server.base_model.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks, as at OpenAI


def completion_logprobs(
    tokenizer: Tokenizer, tokens: list[TokenInfo], count: int, echoed: int = 0
) -> dict[str, list[Any]]:
    """Parallel lists. `top_logprobs` holds the `count` best tokens and the chosen one, by their texts.

    `echoed`: characters of the prompt before the choice's text.
    """
    return {
        "text_offset": [echoed + info.offset for info in tokens],
        "token_logprobs": [finite(info.logprobs.logprob) for info in tokens],
        "tokens": [tokenizer.token_text(info.token)[0] for info in tokens],
        "top_logprobs": [
            top_logprobs(tokenizer, info.token, info.logprobs.logprob, info.logprobs.top[:count])
            for info in tokens
        ],
    }


def top_logprobs(
    tokenizer: Tokenizer, token: int, logprob: float, best: list[tuple[int, float]]
) -> dict[str, float]:
    """`token` and the best tokens by their texts; of tokens of one text the likeliest one's logprob."""
    tops = {tokenizer.token_text(token)[0]: finite(logprob)}
    for other, its_logprob in best:
        text = tokenizer.token_text(other)[0]
        tops[text] = max(tops.get(text, MIN_LOGPROB), its_logprob)
    return tops


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
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}

    content = [
        shown(info.token, info.logprobs.logprob)
        | {"top_logprobs": [shown(token, logprob) for token, logprob in info.logprobs.top[:count]]}
        for info in tokens
    ]
    return {"content": content, "refusal": None}


def finite(logprob: float) -> float:
    """A logprob as JSON can hold it."""
    return max(logprob, MIN_LOGPROB)


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
