"""How much one request may hold: what the base's context can need, and not much more. Knows no route.

What is larger is refused before it is parsed, rendered or tokenised, as all of these take time in proportion.
"""

from server.api.services import Services
from server.errors import ContextTooLong

MIN_BODY_BYTES = 1 << 20
MIN_VALUES = 20_000  # the fields, lists and numbers of any other body
OTHER_BYTES = 65_536  # beside the prompts


def max_body_bytes(deps: Services) -> int:
    """Of a JSON body: as many prompts as a request may have, as token ids, or the longest text."""
    ids = max_values(deps) * (len(str(len(deps.tokenizer.pieces))) + len(", "))
    needed = max(MIN_BODY_BYTES, ids, max_prompt_chars(deps)) + OTHER_BYTES
    return min(deps.settings.max_body_bytes, needed)


def max_values(deps: Services) -> int:
    """Of a JSON body: as many prompts as a request may have, as token ids."""
    return max(MIN_VALUES, deps.settings.max_prompts * _context(deps))


def max_prompt_chars(deps: Services) -> int:
    """Of a prompt or a conversation: more cannot fit the context, were it of the longest tokens."""
    return _context(deps) * deps.tokenizer.longest


def check_chars(deps: Services, chars: int, param: str) -> None:
    """Raise ContextTooLong for a text that would not fit, before it is tokenised."""
    if chars > (limit := max_prompt_chars(deps)):
        raise ContextTooLong(
            f"The model's context is {_context(deps)} tokens, which have at most {limit} characters; "
            f"{param} has {chars}.",
            param=param,
        )


def _context(deps: Services) -> int:
    """The model's, or 0 while the engine has not told it: then no prompt is served either."""
    return deps.max_context if deps.engine.base is not None else 0
