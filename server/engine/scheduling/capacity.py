"""How many rows may be in the engine at once, running or waiting: all together, and of one tenant.

A tenant may have as many rows as it leaves free for others (dynamic thresholds, Choudhury and Hahne 1998):
alone, half of all; beside others less, by weight. So whoever floods meets its own limit while there is room
for everybody else's first request. A request is admitted whole or not at all.
"""

from collections.abc import Mapping
from typing import NamedTuple

from server.errors import PolypeftError, QueueFull, TenantQueueFull


class TenantLoad(NamedTuple):
    """What one tenant has in the engine."""

    rows: int
    weight: float


def refusal(
    tenant: str, rows: int, weight: float, held: Mapping[str, TenantLoad], capacity: int
) -> PolypeftError | None:
    """Why a request of so many rows is not admitted; None if it is. `held` is what each tenant has here."""
    own = held[tenant].rows if tenant in held else 0
    taken = sum(other.rows for other in held.values())
    free = capacity - taken - rows
    weights = {name: other.weight for name, other in held.items() if other.rows} | {tenant: weight}
    largest = max(weights.values())
    share = capacity * weight / (sum(weights.values()) + largest)  # where all tenants' floods would settle
    if free < 0 and (not own or own + rows <= share):
        return QueueFull(f"The server has {taken} of the {capacity} rows that it takes; try again later.")
    if own and own + rows > free * weight / largest:
        return TenantQueueFull(
            f"The request has {rows} rows and the tenant has {own} in the server already, "
            f"more than it leaves free for others; send it when some have ended."
        )
    return None
