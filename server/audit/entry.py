"""An entry of the audit log: ids, names and settings of what was changed, and never a secret or a text."""

from typing import Any, Literal, NamedTuple

import msgspec

MAX_TARGET_CHARS = 256
MAX_DETAILS_BYTES = 2048

Outcome = Literal["done", "refused", "failed", "unknown"]


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One attempt to change something by a caller with a valid key, or by the server itself."""

    actor: str  # the key's id; "operator" for the operator's first key; or "watch"
    by: str  # whose key it is: a tenant's id, or "operator"; "server" for the server itself
    action: str  # such as key.create
    target: str = ""  # what was changed: names and ids, joined by "/"
    outcome: Outcome = "unknown"  # refused: 4xx; failed: 5xx; unknown: the process ended first
    status: int = 0  # of the answer
    address: str = ""  # of the caller
    request_id: str = ""
    details: dict[str, Any] = {}


class Position(NamedTuple):
    """Where an entry stands among those of all tenants: by time, and of one time by tenant."""

    milliseconds: int
    sequence: int
    tenant: str  # whose log the entry is in

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.sequence}-{self.tenant}"

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorts entries newest first."""
        return -self.milliseconds, -self.sequence, self.tenant

    @property
    def stream_id(self) -> str:
        return f"{self.milliseconds}-{self.sequence}"


class Recorded(NamedTuple):
    position: Position
    entry: Entry


def parse_position(text: str) -> Position | None:
    """The reverse of str(position); None for other text."""
    milliseconds, _, rest = text.partition("-")
    sequence, _, tenant = rest.partition("-")
    numbers = milliseconds.isascii() and milliseconds.isdigit() and sequence.isascii() and sequence.isdigit()
    if not numbers or max(len(milliseconds), len(sequence)) > 15 or not tenant:
        return None
    return Position(int(milliseconds), int(sequence), tenant)


def named(*parts: str) -> str:
    """The name of what is changed, out of a request's own text: printable and bounded."""
    text = "/".join(parts)[: MAX_TARGET_CHARS + 1]
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= MAX_TARGET_CHARS else clean[: MAX_TARGET_CHARS - 3] + "..."


def bounded(details: dict[str, Any]) -> dict[str, Any]:
    """`details`, or only the names of its fields if it is too large."""
    if len(msgspec.json.encode(details)) <= MAX_DETAILS_BYTES:
        return details
    return {"fields": sorted(details)[:20]}
