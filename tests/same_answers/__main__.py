"""Record what a checkout answers, and compare two such recordings byte by byte.

    python -m tests.same_answers record OUT [--checkout FOLDER] [--model FOLDER]
    python -m tests.same_answers compare BEFORE AFTER

A recording is a folder of texts, one a kind of request: statuses, headers and bodies with ids, times and
keys as placeholders, the help of every command, the names of all metrics and of log fields. `compare` prints
a unified diff, and ends with status 1 if there is one. The questions are this checkout's, whoever answers.
"""

import argparse
import difflib
import json
import sys
import tempfile
from pathlib import Path

from tests.same_answers import adapters, commands, refusals, requests
from tests.same_answers.serving import Checkout, operator_key
from tests.same_answers.session import Session
from tests.same_answers.volatile import Placeholders

MODEL = Path(".cache/models/smollm2-135m-instruct")
# in this order: later pages ask about what earlier ones made
PAGES = {
    "completions": requests.completions,
    "adapters": requests.uploads_of_adapters,
    "adapter-lists": requests.lists_of_adapters,
    "chat": requests.chat,
    "files": requests.files_and_uploads,
    "jobs": requests.jobs,
    "refused-generation": refusals.generation,
    "refused-routes": refusals.routes,
    "refused-adapters": refusals.uploads_of_adapters,
    "refused-training": refusals.training,
    "aliases-and-pins": requests.aliases_and_pins,
    "operating": requests.operating,
}


def record(checkout: Checkout, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        poet = folder / "loras" / "poet"
        poet.mkdir(parents=True)
        for file, content in adapters.lora(3).items():
            (poet / file).write_bytes(content)
        options = ("--lora-folder", str(poet.parent), "--metrics-adapter-labels", "names")
        logged = ("--log-format", "json", "--log-level", "debug")
        places = Placeholders(
            (name, "folder"), (str(checkout.model), "model"), (str(checkout.folder), "code")
        )
        with checkout.serve(folder, *options, *logged) as url:
            to = Session(url, operator_key(folder), places)
            _ask_all(checkout, to, folder)
        to.page = "log-fields"
        to.write("\n".join(_log_fields(folder / "log")))
        to.save(out)


def compare(before: Path, after: Path) -> bool:
    """Print every difference; whether there is none. Raises FileNotFoundError for what is no recording."""
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*.txt")})
    if not names:
        raise FileNotFoundError(f"neither {before} nor {after} holds a recording")
    differ = False
    for name in names:
        old, new = (_lines(folder / name) for folder in (before, after))
        for line in difflib.unified_diff(old, new, str(before / name), str(after / name)):
            differ = True
            sys.stdout.write(line)
    return not differ


def _ask_all(checkout: Checkout, to: Session, folder: Path) -> None:
    to.page = "tenants"
    for tenant in ("acme", "zeta"):
        to.tenant(tenant)
    for name, ask in PAGES.items():
        to.page = name
        ask(to)
    to.page = "commands"
    commands.commands(checkout, to, folder)
    to.page = "metrics"
    to.metrics()
    to.page = "help"
    commands.helps(checkout, to)


def _log_fields(log: Path) -> list[str]:
    """The sets of fields that its records have."""
    records = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return sorted({", ".join(record) for record in records})


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.same_answers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parts = parser.add_subparsers(required=True, dest="what")
    recording = parts.add_parser("record", help="ask a server of a checkout")
    recording.add_argument("out", type=Path)
    recording.add_argument("--checkout", type=Path, default=Path())
    recording.add_argument("--model", type=Path, default=MODEL)
    comparing = parts.add_parser("compare", help="print what differs")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.what == "record":
        record(Checkout(given.checkout, given.model), given.out)
    elif not compare(given.before, given.after):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
