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
    """How much of a tier one tenant takes, and how much of that it has pinned."""

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
    """A loaded adapter (methods/interface.py Packed); the cache reads only these facts of it."""

    @property
    def nbytes(self) -> int: ...
    @property
    def virtual_tokens(self) -> int: ...
    @property
    def kv_precomputed(self) -> bool: ...
    @property
    def summable(self) -> bool: ...
    def intact(self) -> bool: ...


class Slots(Protocol):
    """The part of a bank that the cache calls."""

    def put(self, slot: int, packed: Any) -> None: ...
    def clear(self, slot: int) -> None: ...


class Fetcher(Protocol):
    """The part of the loader that the cache calls; see loading/loader.py."""

    def fetch(self, ref: AdapterRef) -> "Future[Any]": ...
    def prioritise(self, digest: str) -> bool: ...
    def claim(self, digest: str) -> None: ...
    def release(self, digest: str) -> None: ...
    def forget(self, digest: str) -> None: ...
    def report_corrupt(self, digest: str, tier: str) -> None: ...


class DeviceCopy(Protocol):
    """A copy onto the device, under way or done; see loading/device_copy.py."""

    @property
    def packed(self) -> Any: ...
    @property
    def arrived(self) -> Callable[[], bool]: ...


@dataclass(eq=False)
class Resident(Entry):
    """An adapter on the device, or being copied there. `key` is its digest."""

    method: str = ""
    slot: int = 0
    virtual_tokens: int = 0  # before each row's text
    kv_precomputed: bool = False  # the adapter brings the K/V of its virtual tokens
    summable: bool = False  # it may be weighted, and added to others
    charged: bool = False  # a tenant has been charged for its load
    forgotten: bool = False  # deleted while in use: evicted when the last row releases it
    packed: Any = None  # as it lies on the device
    copy: DeviceCopy | None = None  # under way; it holds a reference

    @property
    def digest(self) -> str:
        return self.key
