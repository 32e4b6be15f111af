"""Loads into RAM that rows wait for, each until its adapter has a slot. No torch, no I/O."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from server.adapters.cache.entries import Fetcher
from server.messages import AdapterRef

KEEP_SECONDS = 30.0  # how long a finished load is kept that no row has asked for again
# Of one tenant, running or waiting for slots; more would delay the next tenant's load.
MAX_LOADS_PER_TENANT = 8
MAX_STALE_STEPS = 2  # a finished load that no row asked for in so many steps gives up its place to another


@dataclass
class Pending:
    """A load that rows wait for, claimed in RAM."""

    ref: AdapterRef
    future: "Future[Any]"
    step: int  # of the engine, in which a row last asked for it
    requested: float  # when that was
    waits_for_own_rows: bool = False  # its tenant is over its share: only that tenant's rows can free a slot


class PendingLoads:
    """At most `max_loads`, by digest. A load's claim in RAM ends when it is dropped."""

    def __init__(self, loader: Fetcher, max_loads: int, clock: Callable[[], float]) -> None:
        self.loads: dict[str, Pending] = {}
        self._loader = loader
        self._max_loads = max_loads
        self._clock = clock
        self._step = 0

    def is_loading(self, ref: AdapterRef) -> bool:
        """Whether it is not in RAM yet."""
        pending = self.loads.get(ref.digest)
        return pending is None or not pending.future.done()

    def start(self, ref: AdapterRef) -> bool:
        """Start a load, if it is not pending; False if too many are."""
        if ref.digest in self.loads:
            return True
        if self._too_many(ref.tenant):
            return False
        self._add(ref, self._loader.fetch(ref))
        return True

    def adopt(self, ref: AdapterRef, load: "Future[Any]") -> None:
        """Add a load that was started elsewhere, beyond `max_loads` if need be."""
        if ref.digest not in self.loads:
            self._loader.claim(ref.digest)
            self._add(ref, load)

    def request(self, ref: AdapterRef) -> Pending | None:
        """The adapter's load, which a row asks for in this step; None if there is none and too many are."""
        if ref.digest not in self.loads:
            self._drop_stale(ref.tenant)
            if not self.start(ref):
                return None
        pending = self.loads[ref.digest]
        pending.step, pending.requested = self._step, self._clock()
        return pending

    def drop(self, digest: str) -> None:
        """Stop waiting for a load, and release its claim in RAM."""
        if self.loads.pop(digest, None):
            self._loader.release(digest)

    def prioritise(self, free_rows: int) -> None:
        """With `free_rows` unused rows in the batch, make up to that many running loads urgent."""
        for digest, load in self.loads.items():
            if free_rows > 0 and not load.future.done():
                free_rows -= self._loader.prioritise(digest)

    def poll(self) -> None:
        """Once a step: drop loads that no row asks for any more."""
        self._step += 1
        now = self._clock()
        for digest, pending in [*self.loads.items()]:
            if pending.future.done() and now - pending.requested > KEEP_SECONDS:
                self.drop(digest)

    def _add(self, ref: AdapterRef, future: "Future[Any]") -> None:
        self.loads[ref.digest] = Pending(ref, future, self._step, self._clock())

    def _too_many(self, tenant: str) -> bool:
        return len(self.loads) >= self._max_loads or len(self._of(tenant)) >= MAX_LOADS_PER_TENANT

    def _of(self, tenant: str) -> list[Pending]:
        return [pending for pending in self.loads.values() if pending.ref.tenant == tenant]

    def _drop_stale(self, tenant: str) -> None:
        """If too many loads are pending, drop the finished one that no row has asked for the longest."""
        if self._too_many(tenant):
            pending = self.loads.values()
            candidates = self._of(tenant) if len(pending) < self._max_loads else pending
            done = [load for load in candidates if load.future.done()]
            oldest = min(done, key=lambda load: load.step, default=None)
            if oldest is not None and self._step - oldest.step > MAX_STALE_STEPS:
                self.drop(oldest.ref.digest)
