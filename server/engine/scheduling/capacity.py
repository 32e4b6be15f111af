"""Limits on the rows in the engine, running or waiting: of all tenants together, and of one tenant.

A tenant may have as many rows as it leaves free for others (dynamic thresholds, Choudhury and Hahne 1998):
half of the capacity when it is alone, less beside others, by weight. A tenant that floods the engine meets
its own limit while there is still room for every other tenant's first request. A request is admitted whole or
not at all.
"""

from collections.abc import Mapping
from typing import NamedTuple

from server.errors import PolypeftError, QueueFull, TenantQueueFull


class TenantLoad(NamedTuple):
    """Rows that one tenant has in the engine, and its weight."""

    rows: int
    weight: float


def refusal(
    tenant: str, rows: int, weight: float, loads: Mapping[str, TenantLoad], capacity: int
) -> PolypeftError | None:
    """The error of a request of `rows` rows that is not admitted; None if it is.

    `loads` are the rows of each tenant, `capacity` the most that all may have together.
    """
    tenant_rows = loads[tenant].rows if tenant in loads else 0
    used = sum(load.rows for load in loads.values())
    free = capacity - used - rows
    weights = {name: load.weight for name, load in loads.items() if load.rows} | {tenant: weight}
    largest = max(weights.values())
    # the rows that the tenant would have if every tenant sent as many as its limit allows
    share = capacity * weight / (sum(weights.values()) + largest)
    if free < 0 and (not tenant_rows or tenant_rows + rows <= share):
        return QueueFull(f"The server has {used} of the {capacity} rows that it takes; try again later.")
    if tenant_rows and tenant_rows + rows > free * weight / largest:
        return TenantQueueFull(
            f"The request has {rows} rows and the tenant has {tenant_rows} in the server already, "
            f"more than it leaves free for others; send it when some have ended."
        )
    return None
