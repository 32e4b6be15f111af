"""CPU time of the scheduler alone, for each step: no model, every row gets a token.

    python -m benchmarks.tenants.scheduling

The best of several rounds, so that it can be compared on a machine that others use too.
"""

import time
from collections.abc import Callable
from typing import Any

from server.adapters.cache.device_cache import AdapterCache
from server.engine.scheduling.kv_blocks import BlockPool
from server.engine.scheduling.row import Row
from server.engine.scheduling.scheduler import Scheduler
from server.messages import Generate, Sampling
from tests.fixtures.slots import Loader, make_cache

ROUNDS, STEPS = 7, 400
LONG = 100_000  # tokens: no row ends by itself


class Load:
    """A scheduler under a load that stays: a row that ends is followed by one of the same tenant."""

    def __init__(self, *, max_seqs: int, output: int) -> None:
        cache: AdapterCache = make_cache(Loader(), slots=4, budget=10_000)
        blocks = BlockPool(20_000, share_prefixes=False)
        self.scheduler = Scheduler(cache, blocks, max_seqs=max_seqs, max_batch_tokens=256, max_context=LONG)
        self.output = output
        self.count = 0

    def add(self, tenant: str, **fields: Any) -> None:
        self.count += 1
        command = Generate(f"row-{self.count}", tenant, [7] * 20, Sampling(max_tokens=LONG), **fields)
        self.scheduler.add(Row(command, 0, tokens=list(command.prompt), prompt_length=20))

    def step(self) -> None:
        for row in self.scheduler.schedule(0.0):
            self.scheduler.commit(row, [7] if row.completes else [])
            if row.output_length >= self.output:
                self.scheduler.remove(row)
                self.add(row.command.tenant)


def decoding() -> Load:
    """A full batch and nobody waits."""
    load = Load(max_seqs=32, output=LONG)
    for i in range(32):
        load.add(f"t{i % 8}")
    return load


def queue_of_one() -> Load:
    """A full batch of one tenant, and 256 of its rows wait."""
    load = Load(max_seqs=32, output=24)
    for _ in range(288):
        load.add("t")
    return load


def two_tenants() -> Load:
    """Ten rows of one to each of the other."""
    load = Load(max_seqs=32, output=24)
    for i in range(288):
        load.add("large" if i % 11 else "small")
    return load


def many_tenants() -> Load:
    """288 tenants with a row each."""
    load = Load(max_seqs=32, output=24)
    for i in range(288):
        load.add(f"t{i}")
    return load


def seconds(build: Callable[[], Load]) -> float:
    """CPU seconds of a step."""
    best = float("inf")
    for _ in range(ROUNDS):
        load = build()
        for _ in range(50):
            load.step()
        start = time.process_time()
        for _ in range(STEPS):
            load.step()
        best = min(best, (time.process_time() - start) / STEPS)
    return best


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("load", "microseconds a step")
    for build in (decoding, queue_of_one, two_tenants, many_tenants):
        table.add_row(build.__doc__, f"{1e6 * seconds(build):.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
