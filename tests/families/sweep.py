"""Every causal language model of the installed transformers through the engine: exact, or refused by name.

    python -m tests.families.sweep [NAME...]    NAME: a model type, or a part of one case's name

Verdicts go to a file as they come (--results); a sweep that was cut short goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

import msgspec

from tests.families.cases import cases
from tests.families.hostile import SEED
from tests.families.verdict import Verdict
from tests.families.workers import verdicts

RESULTS = Path("build/families.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=0)
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.results)
    names = [f"{SEED}{i}" for i in range(options.seeds)] or [case.name for case in cases()]
    if options.names:
        wanted = [name for name in names if name in options.names or name.partition(":")[0] in options.names]
    else:
        wanted = [name for name in names if name not in known]
    with options.results.open("ab") as file:
        for verdict in verdicts(wanted, options.workers):
            file.write(msgspec.json.encode(verdict) + b"\n")
            file.flush()
            known[verdict.name] = verdict
            worst = max(verdict.errors.values(), default=0.0)
            sys.stdout.write(
                f"{verdict.outcome:8} {verdict.name:32} {verdict.model_type:16} {worst:.1e} {verdict.seconds:5.1f} s {verdict.detail}\n"
            )
            sys.stdout.flush()


def read(results: Path) -> dict[str, Verdict]:
    """What is known so far, by case; the last verdict counts."""
    lines = results.read_bytes().splitlines() if results.exists() else []
    found = [msgspec.json.decode(line, type=Verdict) for line in lines]
    return {verdict.name: verdict for verdict in found}


if __name__ == "__main__":
    main()
