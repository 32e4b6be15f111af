"""How much of a tier is whose. Each tenant that asked for anything of late has a share by its weight.

A share is a promise, not a wall: alone, a tenant may fill everything. When room is needed, tenants over their
share give it, so a flood of distinct adapters displaces the flooder's own and nobody else's.
"""

import time
from collections.abc import Callable, Iterable

IDLE_SECONDS = 600.0  # a tenant silent for so long has no share; what it left goes first
MOST = 10_000  # tenants remembered before the silent ones are cleared away


class Shares:
    """Weights of the tenants that are active. One for all tiers; told by the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, tuple[float, float]] = {}  # weight, when it last asked

    def note(self, tenant: str, weight: float = 1.0) -> None:
        """The tenant asks for something now."""
        now = self._clock()
        if len(self._tenants) >= MOST and tenant not in self._tenants:
            active = {t: known for t, known in self._tenants.items() if now - known[1] <= IDLE_SECONDS}
            self._tenants = active if len(active) < MOST else {}
        self._tenants[tenant] = (weight, now)

    def weight(self, tenant: str) -> float:
        """0 for a tenant that has been silent."""
        weight, last = self._tenants.get(tenant, (0.0, 0.0))
        return weight if self._clock() - last <= IDLE_SECONDS else 0.0

    def of(self, tenants: Iterable[str]) -> dict[str, float]:
        """What part of a tier each of those who want some of it may call its own."""
        weights = {tenant: self.weight(tenant) for tenant in tenants}
        total = sum(weights.values())
        return {tenant: weight / total if total else 0.0 for tenant, weight in weights.items()}
