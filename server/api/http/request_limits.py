"""Caps on the size of one request, derived from the base's context: little more than it can need.

A larger request is refused before it is parsed, rendered or tokenised: each takes time in proportion to size.
(Rates and quotas: see Services.admit, server/tenancy and the engine's scheduler.) Knows no route.
"""

from server.api.services import Services
from server.errors import ContextTooLong

MIN_BODY_BYTES = 1 << 20
MIN_VALUES = 20_000  # fields, lists and numbers, for bodies without token ids
OTHER_BYTES = 65_536  # of a body beside its prompts


def max_body_bytes(deps: Services) -> int:
    """Most bytes of a JSON body: the most prompts, as token ids, or the longest text."""
    ids = max_values(deps) * (len(str(len(deps.tokenizer.pieces))) + len(", "))
    needed = max(MIN_BODY_BYTES, ids, max_prompt_chars(deps)) + OTHER_BYTES
    return min(deps.settings.max_body_bytes, needed)


def max_values(deps: Services) -> int:
    """Most values of a JSON body: the most prompts, as token ids."""
    return max(MIN_VALUES, deps.settings.max_prompts * _context(deps))


def max_prompt_chars(deps: Services) -> int:
    """Most characters of a prompt or a conversation: a context full of the longest tokens."""
    return _context(deps) * deps.tokenizer.longest


def check_chars(deps: Services, chars: int, param: str) -> None:
    """Raise ContextTooLong for a text that cannot fit, before it is tokenised."""
    if chars > (limit := max_prompt_chars(deps)):
        raise ContextTooLong(
            f"The model's context is {_context(deps)} tokens, which have at most {limit} characters; "
            f"{param} has {chars}.",
            param=param,
        )


def _context(deps: Services) -> int:
    """Tokens of the model's context; 0 until the engine has reported it: then no prompt is served either."""
    return deps.max_context if deps.engine.base is not None else 0
