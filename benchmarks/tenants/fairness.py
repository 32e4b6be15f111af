"""Two tenants of equal weight, one with ten times the clients of the other: what each gets.

    python -m benchmarks.tenants.fairness                                # about 25 minutes
    python -m benchmarks.tenants.fairness --seconds 20 --places 8 --only plain

A real `polypeft serve` with SmolLM2-135M. The small tenant has as many clients as half the places, so that it
asks for its share and no more; it has a case alone first. Then the large one joins, in several ways. Tokens
are counted by their events while both ask, after a fifth of the time. Prompt lookup is off, so that an event
is a token. A run of the large tenant alone shows what one tenant can have.
"""

import asyncio
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.serving import CACHE, MODEL, upload
from benchmarks.support.arms import quiet
from benchmarks.tenants.clients import Profile, crowd, first_token, tokens_between
from server.base_model.default_model import ensure_default_model
from tests.e2e.serving import Serving

ADAPTERS, SLOTS = 32, 4
WARM_PART = 0.2
SMALL = Profile()
CASES = {
    "plain": Profile(),
    "long prompts": Profile(prompt_tokens=1200),
    f"{ADAPTERS} adapters, {SLOTS} slots": Profile(models=[f"a{i}" for i in range(ADAPTERS)]),
    "n at its most": Profile(n=8),
    "clients hang up": Profile(hang_up=0.5),
}
Figures = dict[str, Any]


def measure(
    server: Serving, keys: tuple[str, str], case: Profile | None, places: int, seconds: float
) -> Figures:
    """The small tenant, beside the large one unless `case` is None."""
    small = (keys[0], SMALL, places // 2)
    large = [] if case is None else [(keys[1], case, 10 * (places // 2))]
    start = time.perf_counter()
    answers, *others = asyncio.run(crowd(server.url, MODEL, [small, *large], seconds))
    window = (start + WARM_PART * seconds, start + seconds)
    mine, theirs = (tokens_between(group, *window) for group in (answers, others[0] if others else []))
    late = [answer for answer in answers if answer.sent >= window[0]]
    return {
        "share": mine / (mine + theirs),
        "tokens_per_s": (mine + theirs) / (window[1] - window[0]),
        "ttft_p50": first_token(late, 50),
        "ttft_p95": first_token(late, 95),
        "refused": Counter(answer.code for answer in answers if answer.code),
        "gap": server.gauge("polypeft_fairness_gap"),
    }


def alone(server: Serving, key: str, places: int, seconds: float) -> float:
    """Tokens a second of one tenant that asks for ten times half the places."""
    start = time.perf_counter()
    (answers,) = asyncio.run(crowd(server.url, MODEL, [(key, Profile(), 10 * (places // 2))], seconds))
    window = (start + WARM_PART * seconds, start + seconds)
    return tokens_between(answers, *window) / (window[1] - window[0])


def main(
    seconds: Annotated[float, typer.Option(help="Of each case.")] = 90.0,
    places: Annotated[int, typer.Option(help="Rows in the batch.")] = 32,
    only: Annotated[str, typer.Option(help="One case, by its name.")] = "",
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("fairness.json"),
) -> None:
    """Measure, print a table, write JSON."""
    quiet()
    model = ensure_default_model(CACHE)
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="polypeft-fairness-") as scratch:
        (Path(scratch) / "data").mkdir()
        (Path(scratch) / "data" / "models").symlink_to(CACHE / "models")
        options = ("--adapter-slots", str(SLOTS), "--max-seqs", str(places), "--lookup-tokens", "0")
        with Serving(MODEL, Path(scratch), *options, "--workers", "0") as server:
            keys = (server.tenant("small"), server.tenant("large"))
            if not only or "adapters" in only:
                upload(server, keys[1], model, Path(scratch), ADAPTERS)
            capacity = alone(server, keys[1], places, seconds)
            found["small alone"] = measure(server, keys, None, places, seconds)
            for name, case in CASES.items():
                if not only or name.startswith(only):
                    found[name] = measure(server, keys, case, places, seconds)
            Console().print(table(found, capacity))
            report = {"large_alone_tokens_per_s": capacity, "cases": found}
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def table(found: dict[str, Figures], capacity: float) -> Table:
    shown = Table(
        "case", "small's share", "TTFT p50", "p95", "over alone", "tokens/s", "gap / bound", "small refused",
        caption=f"the large tenant alone: {capacity:.0f} tokens/s",
    )  # fmt: skip
    base = found["small alone"]["ttft_p95"]
    for name, own in found.items():
        shown.add_row(
            name,
            f"{own['share']:.2f}",
            f"{own['ttft_p50']:.2f} s",
            f"{own['ttft_p95']:.2f} s",
            f"{own['ttft_p95'] / base:.2f}",
            f"{own['tokens_per_s']:.0f}",
            f"{own['gap']:.2f}",
            str(dict(own["refused"]) or "-"),
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
