"""Entries of the cache's tiers, and the protocols of what loads, copies and holds them. No torch, no I/O."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

from server.messages import AdapterRef


@dataclass(eq=False)
class Entry:
    """One adapter in a tier. All but `references` changes through the tier's index alone."""

    key: str
    tenant: str  # that requested it last; its share is charged
    nbytes: int
    references: int = 0  # > 0: in use, or being copied here
    pinned: bool = False  # by its tenant


@dataclass
class TenantUsage:
    """What one tenant takes of a tier, and how much of that it has pinned."""

    nbytes: int = 0
    count: int = 0
    pinned_bytes: int = 0
    pinned_count: int = 0

    def add(self, entry: Entry, sign: int = 1) -> None:
        self.nbytes += sign * entry.nbytes
        self.count += sign
        if entry.pinned:
            self.pinned_bytes += sign * entry.nbytes
            self.pinned_count += sign

    def copy(self) -> "TenantUsage":
        return replace(self)


@dataclass
class Ledger:
    """Each tenant's usage and share while an eviction is planned; victims are taken off `usage`."""

    usage: dict[str, TenantUsage]
    shares: dict[str, float]


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
