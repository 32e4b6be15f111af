"""Every causal language model of the installed transformers through the engine: exact, or refused by name.

    python -m tests.families.sweep [NAME...]    all, or families and cases by name
    python -m tests.families.sweep --seeds 300  hostile configs instead

Verdicts go to a file as they come; a sweep that was cut short goes on where it stopped. `--document` writes
the table of docs/bases.md from it.
"""

import argparse
import sys
from pathlib import Path

import msgspec

from tests.families.cases import cases
from tests.families.hostile import SEED
from tests.families.table import write_table
from tests.families.verdict import Verdict
from tests.families.workers import verdicts

BAD = ("wrong", "dies")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=0, help="so many hostile configs, from seed 0")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("build/families.jsonl"))
    parser.add_argument("--document", type=Path, help="a Markdown file, whose table is written anew")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.results)
    names = [f"{SEED}{i}" for i in range(options.seeds)] or [case.name for case in cases()]
    if options.names:
        wanted = [name for name in names if {name, name.partition(":")[0]} & {*options.names}]
    else:
        wanted = [name for name in names if name not in known]
    with options.results.open("ab") as file:
        for verdict in verdicts(wanted, options.workers):
            file.write(msgspec.json.encode(verdict) + b"\n")
            file.flush()
            known[verdict.name] = verdict
            report(verdict)
    found = [known[name] for name in names if name in known]
    if options.document:
        write_table(options.document, found)
    bad = sum(verdict.outcome in BAD for verdict in found)
    sys.stdout.write(f"{len(found)} cases, {bad} wrong or dead\n")
    return min(bad, 1)


def report(verdict: Verdict) -> None:
    worst = max(verdict.errors.values(), default=0.0)
    facts = f"{verdict.outcome:8} {verdict.name:36} {verdict.model_type:18} {worst:.1e}"
    sys.stdout.write(f"{facts} {verdict.seconds:5.1f} s  {verdict.detail}\n")
    sys.stdout.flush()


def read(results: Path) -> dict[str, Verdict]:
    """What is known so far, by case; the last verdict counts."""
    lines = results.read_bytes().splitlines() if results.exists() else []
    found = [msgspec.json.decode(line, type=Verdict) for line in lines]
    return {verdict.name: verdict for verdict in found}


if __name__ == "__main__":
    sys.exit(main())
