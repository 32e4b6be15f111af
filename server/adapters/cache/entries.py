"""What the cache of slots deals with: loads on their way to it, residents, and those who bring and hold them.

No torch, no I/O.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from server.adapters.cache.tier_index import Entry
from server.messages import AdapterRef


class Loaded(Protocol):
    """What the loader brings: opaque here but for what it costs in bytes and in context."""

    @property
    def nbytes(self) -> int: ...
    @property
    def virtual(self) -> int: ...
    @property
    def given(self) -> bool: ...
    @property
    def summable(self) -> bool: ...
    def intact(self) -> bool: ...


class Slots(Protocol):
    """The part of a bank that this file may touch."""

    def put(self, slot: int, packed: Any) -> None: ...
    def clear(self, slot: int) -> None: ...


class Fetcher(Protocol):
    def fetch(self, ref: AdapterRef) -> "Future[Any]": ...
    def hasten(self, digest: str) -> bool: ...
    def claim(self, digest: str) -> None: ...
    def release(self, digest: str) -> None: ...
    def forget(self, digest: str) -> None: ...
    def spoiled(self, digest: str, tier: str) -> None: ...


class Moving(Protocol):
    """A copy onto the device."""

    @property
    def packed(self) -> Any: ...
    @property
    def arrived(self) -> Callable[[], bool]: ...


@dataclass
class Pending:
    """A load that somebody waits for, claimed in RAM until it has a slot."""

    ref: AdapterRef
    future: "Future[Any]"
    step: int  # in which somebody last asked
    asked: float  # when that was
    own: bool = False  # its tenant is over its share, and has to make room itself


@dataclass(eq=False)
class Resident(Entry):
    """`key` is the digest."""

    method: str = ""
    slot: int = 0
    virtual: int = 0  # tokens it puts before each row
    given: bool = False  # their K/V need no computing
    summable: bool = False  # may be weighted, and added to others
    forgotten: bool = False  # deleted while in use: goes with its last row
    packed: Any = None  # as it lies on the device
    moving: Moving | None = None  # on its way: pinned by that, too

    @property
    def digest(self) -> str:
        return self.key
