"""Turns a request's prompt or messages into token ids that fit the context."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from anyio.to_thread import run_sync

from server.api.generation.chat_bodies import Message
from server.api.http.body_model import at_most
from server.api.http.request_limits import check_chars
from server.api.services import Services
from server.api.tools.conversation import conversation
from server.base_model.chat_tools import tools_chars
from server.errors import ContextTooLong, InvalidField, shown
from server.tenancy.tenants import Tenant

T = TypeVar("T")
MAX_INLINE_CHARS = 4096  # a longer text is tokenised on a thread, off the event loop
_KINDS = "prompt must be text, a list of texts, a list of token ids, or a list of lists of token ids"


async def completion_prompts(deps: Services, tenant: Tenant, prompt: Any) -> list[list[int]]:
    """The token ids of each prompt. Raises InvalidField, ContextTooLong."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    sent = [prompt] if isinstance(prompt, str) or type(first) is int else prompt
    if not isinstance(sent, list) or not sent:
        raise InvalidField(f"{_KINDS}, not {shown(prompt)}.", param="prompt")
    at_most("the number of prompts", len(sent), deps.settings.max_prompts, "prompt")
    prompts = []
    for one in sent:
        if isinstance(one, str):
            check_chars(deps, len(one), "prompt")
            prompts.append(await _tokenize(deps, tenant, len(one), partial(deps.tokenizer.encode, one)))
        elif isinstance(one, list) and len(one) > deps.max_context:  # before its entries are looked at
            fit_max_tokens(one, None, None, deps.max_context)
        elif _is_tokens(one):
            prompts.append(_in_vocabulary(one, deps.base.vocab_size))
        else:
            raise InvalidField(f"{_KINDS}, not {shown(prompt)}.", param="prompt")
    if not all(prompts):
        raise InvalidField("prompt must have at least one token, not 0.", param="prompt")
    return prompts


async def chat_prompt(
    deps: Services, tenant: Tenant, messages: list[Message], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The token ids of the conversation, with the functions `tools`, as the base's chat template renders it.

    Raises InvalidRequest, ContextTooLong.
    """
    plain = conversation(messages)
    chars = sum(len(m["content"]) for m in plain) + tools_chars(plain, tools or [])
    check_chars(deps, chars, "messages")
    tokenizer = deps.tokenizer
    return await _tokenize(
        deps, tenant, chars, lambda: tokenizer.encode_chat(tokenizer.render_chat(plain, tools))
    )


def fit_max_tokens(
    prompt: list[int],
    requested: int | None,
    default: int | None,
    context: int,
    whose: str = "The model's context",
) -> int:
    """The most tokens of the answer: as requested, else `default` or less, else all that fit the context.

    Raises ContextTooLong with both counts.
    """
    room = context - len(prompt)
    needed = requested or 1
    if needed > room:
        raise ContextTooLong(
            f"{whose} is {context} tokens; the prompt has {len(prompt)} and the answer may take {needed}.",
            param="prompt" if room < 1 else "max_tokens",
        )
    return requested or min(default or room, room)


async def _tokenize(deps: Services, tenant: Tenant, chars: int, work: Callable[[], T]) -> T:
    """The result of `work`. For a long text it runs on a thread, one at a time, fairly between tenants."""
    if chars <= MAX_INLINE_CHARS:
        return work()
    async with deps.tokenizer_lock.acquire(tenant.id, deps.settings.request_seconds):
        return await run_sync(work)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _in_vocabulary(tokens: list[int], size: int) -> list[int]:
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < size:
            raise InvalidField(
                f"prompt has the token id {shown(token)}; they run from 0 to {size - 1}.", param="prompt"
            )
    return tokens
