"""What a tenant may keep, as the registry asks for it. Knows not where limits are set."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from server.errors import QuotaExceeded, shown

NO_LIMIT = 2**53


class AdapterLimits(Protocol):
    """None: no limit."""

    @property
    def adapters(self) -> int | None: ...
    @property
    def adapter_bytes(self) -> int | None: ...


LimitsOf = Callable[[str], Awaitable[AdapterLimits]]  # by tenant


class Quota(NamedTuple):
    """A tenant's limits as numbers, and the sentences of their refusals."""

    adapters: int = NO_LIMIT
    adapter_bytes: int = NO_LIMIT

    @classmethod
    def of(cls, limits: AdapterLimits) -> "Quota":
        return cls(*(NO_LIMIT if cap is None else cap for cap in (limits.adapters, limits.adapter_bytes)))

    def too_many(self) -> QuotaExceeded:
        return QuotaExceeded(f"A tenant may have {self.adapters} adapters; delete one first.")

    def too_many_bytes(self) -> QuotaExceeded:
        return QuotaExceeded(
            f"A tenant may keep {self.adapter_bytes} bytes of adapters, deleted ones that can be restored "
            "included; purge some first."
        )


def too_many_versions(name: str, most: int) -> QuotaExceeded:
    return QuotaExceeded(f"Adapter {shown(name)} has {most} versions, the most it may; delete one.")


async def unlimited(_tenant: str) -> Quota:
    return Quota()
