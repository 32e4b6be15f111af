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


async def completion_prompts(
    deps: Services, tenant: Tenant, prompt: Any, keep: int | None = None, *, special: bool = True
) -> list[list[int]]:
    """The last `keep` token ids of each prompt; `special`: of texts, with those that the tokenizer puts
    before every text. Raises InvalidField, ContextTooLong.
    """
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    sent = [prompt] if isinstance(prompt, str) or type(first) is int else prompt
    if not isinstance(sent, list) or not sent:
        raise InvalidField(f"{_KINDS}, not {shown(prompt)}.", param="prompt")
    at_most("the number of prompts", len(sent), deps.settings.max_prompts, "prompt")
    prompts = []
    for one in sent:
        if isinstance(one, str):
            prompts.append(last(await text_tokens(deps, tenant.id, one, special=special), keep))
            continue
        if isinstance(one, list):
            one = last(one, keep)
        if isinstance(one, list) and len(one) > deps.max_context:  # before its entries are looked at
            fit_max_tokens(one, None, None, deps.max_context)
        elif _is_tokens(one):
            prompts.append(in_vocabulary(one, deps.base.vocab_size))
        else:
            raise InvalidField(f"{_KINDS}, not {shown(prompt)}.", param="prompt")
    if not all(prompts):
        raise InvalidField("prompt must have at least one token, not 0.", param="prompt")
    return prompts


async def text_tokens(deps: Services, tenant_id: str, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a text; `special` as in Tokenizer.encode. Raises ContextTooLong."""
    check_chars(deps, len(text), "prompt")
    return await off_loop(deps, tenant_id, len(text), partial(deps.tokenizer.encode, text, special=special))


async def chat_prompt(
    deps: Services,
    tenant: Tenant,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    answer: bool = True,
    open_end: bool = False,
) -> list[int]:
    """The token ids of the conversation, with the functions `tools`, as the base's chat template renders it:
    with the beginning of an `answer`, or with an `open_end` for the answer to continue.

    Raises InvalidRequest, ContextTooLong.
    """
    plain = conversation(messages)
    chars = sum(len(m["content"]) for m in plain) + tools_chars(plain, tools or [])
    check_chars(deps, chars, "messages")
    tokenizer = deps.tokenizer
    render = partial(tokenizer.render_chat, plain, tools, answer=answer and not open_end, open_end=open_end)
    return await off_loop(deps, tenant.id, chars, lambda: tokenizer.encode_chat(render()))


def kept_tokens(truncate: int | None, context: int, max_tokens: int | None) -> int | None:
    """How many tokens of a prompt truncate_prompt_tokens keeps: its last ones; -1: all that fit the context
    beside the answer; None: all.
    """
    return max(1, context - (max_tokens or 1)) if truncate == -1 else truncate


def last(prompt: list[T], keep: int | None) -> list[T]:
    return prompt if keep is None else prompt[-keep:]


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
    needed = 1 if requested is None else requested
    if needed > room:
        raise ContextTooLong(
            f"{whose} is {context} tokens; the prompt has {len(prompt)} and the answer may take {needed}.",
            param="prompt" if room < 1 else "max_tokens",
        )
    return min(default or room, room) if requested is None else requested


async def off_loop(deps: Services, tenant_id: str, size: int, work: Callable[[], T]) -> T:
    """The result of `work`. If it is long, it runs on a thread, one at a time, fairly between tenants.

    `size`: characters of the text, or as many tokens or logprobs.
    """
    if size <= MAX_INLINE_CHARS:
        return work()
    async with deps.tokenizer_lock.acquire(tenant_id, deps.settings.request_seconds):
        return await run_sync(work)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def in_vocabulary(tokens: list[int], size: int, param: str = "prompt") -> list[int]:
    """`tokens`. Raises InvalidField for an id that the vocabulary lacks."""
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < size:
            raise InvalidField(
                f"{param} has the token id {shown(token)}; they run from 0 to {size - 1}.", param=param
            )
    return tokens
