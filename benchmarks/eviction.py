"""What the tiers' policy keeps, against LRU and against what no policy can beat, on traces of asks.

    python -m benchmarks.eviction                      # every trace, two minutes, no model, no engine

A trace is a sequence of adapters asked for, one after the other. Popularity is S-LoRA's: adapter number
floor(N * power(alpha)), so alpha 1 is uniform and 0.1 extreme. Sizes are those of LoRAs of ranks 8 to 64 on
all linears of SmolLM2-135M. Cost is the time to load what was not there (policy.FROM_STORE). The bounds know
the future: each ask but an adapter's first can be a hit only if the adapter stays from the ask before, which
takes its size for so long; the bound takes the cheapest of those until the tier is full on average (PFOO-L,
Berger et al. 2018). No policy reaches it. For equal sizes, Belady's own rule is replayed as well.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from server.adapters.cache.entries import Entry
from server.adapters.cache.eviction_policy import FROM_STORE, FairShares
from server.adapters.cache.tier_index import TierIndex

RANKS = (8, 16, 32, 64)
BYTES_A_RANK = 1_220_000  # of all linears, fp32
TENANT = "one"  # shares decide nothing here: all adapters are one tenant's


@dataclass(frozen=True)
class Trace:
    name: str
    asks: list[int]
    sizes: list[int]  # bytes, by adapter
    budget: int


@dataclass(frozen=True)
class Outcome:
    """Parts of all asks, of all bytes asked for, of all seconds it would take to load each of them."""

    hits: float
    byte_misses: float
    cost_misses: float


def lru(trace: Trace) -> list[bool]:
    held: OrderedDict[int, int] = OrderedDict()
    used, hits = 0, []
    for key in trace.asks:
        hits.append(key in held)
        if key in held:
            held.move_to_end(key)
            continue
        held[key] = size = trace.sizes[key]
        used += size
        while used > trace.budget:
            used -= held.popitem(last=False)[1]
    return hits


def ours(trace: Trace, *, optional: bool = False) -> list[bool]:
    """The index of every tier. `optional`: as on disk, where a newcomer may be left out."""
    index: TierIndex[Entry] = TierIndex(trace.budget, FROM_STORE, FairShares())
    index.shares.record(TENANT)
    hits = []
    for number in trace.asks:
        key, size = str(number), trace.sizes[number]
        index.record_request(key, TENANT)
        hits.append(key in index.entries)
        if key in index.entries:
            continue
        gone = index.plan_eviction(TENANT, size)
        if gone is None or (optional and not index.should_admit(key, TENANT, size, gone)):
            continue
        for entry in gone:
            index.drop(entry.key)
        index.add(Entry(key, TENANT, size))
    return hits


def disk(trace: Trace) -> list[bool]:
    return ours(trace, optional=True)


def belady(trace: Trace) -> list[bool]:
    """Out goes what is asked for again the latest; the best there is for equal sizes."""
    following = _following(trace.asks)
    held: dict[int, int] = {}
    hits, used = [], 0
    for at, key in enumerate(trace.asks):
        hits.append(key in held)
        used += 0 if key in held else trace.sizes[key]
        held[key] = following[at]
        while used > trace.budget:
            last = max(held, key=held.__getitem__)
            used -= trace.sizes[last]
            del held[last]
    return hits


def bound(trace: Trace, worth: Callable[[int], float]) -> float:
    """The part of all `worth` (of a size) that the best of all policies could spare, or more."""
    total = sum(worth(trace.sizes[key]) for key in trace.asks)
    stays = [
        ((after - at) * trace.sizes[key], worth(trace.sizes[key]))
        for at, (key, after) in enumerate(zip(trace.asks, _following(trace.asks), strict=True))
        if after < len(trace.asks)
    ]
    left, spared = trace.budget * len(trace.asks), 0.0
    for room, value in sorted(stays, key=lambda stay: stay[0] / stay[1]):
        if room > left:
            return (spared + value * left / room) / total
        left -= room
        spared += value
    return spared / total


def outcome(trace: Trace, hits: Sequence[bool]) -> Outcome:
    sizes = np.array([trace.sizes[key] for key in trace.asks], float)
    missed = ~np.array(hits)
    costs = FROM_STORE.latency + sizes / FROM_STORE.bandwidth
    return Outcome(
        float(1 - missed.mean()),
        float(sizes[missed].sum() / sizes.sum()),
        float(costs[missed].sum() / costs.sum()),
    )


def limits(trace: Trace) -> Outcome:
    """What nobody can do better than."""
    return Outcome(
        bound(trace, lambda _size: 1.0),
        1 - bound(trace, float),
        1 - bound(trace, FROM_STORE.seconds),
    )


def make_traces(adapters: int, asks: int, seed: int) -> list[Trace]:
    """Power laws, with equal and mixed sizes; the same with scans, with drift, with bursts."""
    rng = np.random.default_rng(seed)
    equal = [16 * BYTES_A_RANK] * adapters
    mixed = [int(rank) * BYTES_A_RANK for rank in rng.choice(RANKS, adapters)]

    def power(alpha: float, count: int, order: Sequence[int] | None = None) -> list[int]:
        order = rng.permutation(adapters).tolist() if order is None else order
        return [int(order[int(p * adapters)]) for p in rng.power(alpha, count)]

    def room(sizes: list[int], part: float) -> int:
        return int(sum(sizes) * part)

    traces = [
        Trace(f"alpha {alpha:g}, {kind}", power(alpha, asks), sizes, room(sizes, 0.05))
        for alpha in (0.1, 0.3, 1.0)
        for kind, sizes in (("rank 16", equal), ("ranks 8 to 64", mixed))
    ]
    scans, same = list[int](), rng.permutation(adapters).tolist()
    for _ in range(10):  # every so often somebody walks through a quarter of all adapters
        scans += power(0.3, asks // 14, same) + rng.permutation(adapters)[: asks // 35].tolist()
    drift = [key for _ in range(8) for key in power(0.3, asks // 8)]  # other adapters are popular each time
    return [
        *traces,
        Trace("alpha 0.3, scans", scans, mixed, room(mixed, 0.05)),
        Trace("alpha 0.3, drift", drift, mixed, room(mixed, 0.05)),
        Trace("alpha 0.3, a tier of a fifth", power(0.3, asks), mixed, room(mixed, 0.2)),
    ]


def draw(path: Path, results: dict[str, dict[str, Outcome]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = list(results)
    policies = list(next(iter(results.values())))
    for i, policy in enumerate(policies):
        at = [n + (i - len(policies) / 2) * 0.15 for n in range(len(names))]
        axes.bar(at, [results[name][policy].cost_misses for name in names], width=0.15, label=policy)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set(ylabel="time spent loading, of loading at each ask", ylim=(0, 1))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)


def main(
    adapters: int = 2000,
    asks: int = 40_000,
    seed: int = 0,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("eviction.json"),
    plot: Annotated[Path | None, typer.Option(help="Where to draw the cost of misses, as PNG.")] = None,
) -> None:
    """Replay, compare, print a table, write JSON."""
    table = Table(
        "trace", "policy", "hits", "bytes missed", "cost missed", title=f"{adapters} adapters, {asks} asks"
    )
    results: dict[str, dict[str, Outcome]] = {}
    policies = {"LRU": lru, "ours": ours, "ours, on disk": disk, "Belady": belady}
    for trace in track(make_traces(adapters, asks, seed), console=Console(stderr=True)):
        own = {name: outcome(trace, replay(trace)) for name, replay in policies.items()}
        results[trace.name] = own | {"bound": limits(trace)}
        for name, found in results[trace.name].items():
            figures = (f"{value:.3f}" for value in (found.hits, found.byte_misses, found.cost_misses))
            table.add_row(trace.name if name == "LRU" else "", name, *figures)
        table.add_section()
    Console().print(table)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    shown = {t: {p: vars(found) for p, found in own.items()} for t, own in results.items()}
    job = {"adapters": adapters, "asks": asks, "seed": seed}
    output.write_text(
        json.dumps({"date": date, "job": job, "results": shown}, indent=1) + "\n", encoding="utf-8"
    )
    if plot:
        draw(plot, results)


def _following(asks: Sequence[int]) -> list[int]:
    """For each ask, when the same adapter is asked for next; len(asks) for never."""
    following = [len(asks)] * len(asks)
    later: dict[int, int] = {}
    for at in range(len(asks) - 1, -1, -1):
        following[at] = later.get(asks[at], len(asks))
        later[asks[at]] = at
    return following


if __name__ == "__main__":
    typer.run(main)
