"""From a request's prompt or messages to token ids that fit the context."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from anyio.to_thread import run_sync

from server.api.schemas import Message, at_most
from server.api.services import Services
from server.errors import ContextTooLong, InvalidField, shown

T = TypeVar("T")
INLINE_CHARS = 4096  # a longer text is worth the hop to a thread: the loop must stay free
_KINDS = "prompt must be text, a list of texts, a list of token ids, or a list of lists of token ids"


async def completion_prompts(parts: Services, prompt: Any) -> list[list[int]]:
    """Each prompt's tokens. Raises InvalidField for what is no prompt."""
    given = [prompt] if isinstance(prompt, str) or _is_tokens(prompt) else prompt
    if not isinstance(given, list) or not given:
        raise InvalidField(f"{_KINDS}, not {shown(prompt)}.", param="prompt")
    at_most("the number of prompts", len(given), parts.settings.max_prompts, "prompt")
    prompts = []
    for one in given:
        if isinstance(one, str):
            prompts.append(await _aside(len(one), partial(parts.tokenizer.encode, one)))
        elif _is_tokens(one):
            prompts.append(_in_vocabulary(one, parts.base.vocab_size))
        else:
            raise InvalidField(f"{_KINDS}, not {shown(prompt)}.", param="prompt")
    if not all(prompts):
        raise InvalidField("prompt must have at least one token, not 0.", param="prompt")
    return prompts


async def chat_prompt(parts: Services, messages: list[Message]) -> list[int]:
    """The conversation as the base's template renders it."""
    plain = [{"role": _role(m), "content": m.text} for m in messages]
    chars = sum(len(m["content"]) for m in plain)
    tokenizer = parts.tokenizer
    return await _aside(chars, lambda: tokenizer.encode_chat(tokenizer.render_chat(plain)))


def fit(prompt: list[int], asked: int | None, default: int | None, context: int) -> int:
    """How many tokens the answer may have. None: as `default`, or all that fits.

    Raises ContextTooLong with both counts.
    """
    room = context - len(prompt)
    wanted = asked or 1
    if wanted > room:
        raise ContextTooLong(
            f"The model's context is {context} tokens; the prompt has {len(prompt)} and the answer may take "
            f"{wanted}.",
            param="prompt" if room < 1 else "max_tokens",
        )
    return asked or min(default or room, room)


async def _aside(chars: int, work: Callable[[], T]) -> T:
    return work() if chars <= INLINE_CHARS else await run_sync(work)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _in_vocabulary(tokens: list[int], size: int) -> list[int]:
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < size:
            raise InvalidField(
                f"prompt has the token id {shown(token)}; they run from 0 to {size - 1}.", param="prompt"
            )
    return tokens


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role
