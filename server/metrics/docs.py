"""docs/metrics.md, generated from the declarations. `tests/server/metrics/test_names.py` compares the two.

python -m server.metrics.docs docs/metrics.md      write the page's tables anew
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from server.metrics.engine_names import ENGINE
from server.metrics.family import Family
from server.metrics.labels import OPEN
from server.metrics.names import API, FLEET, SHARED, WORKER

TABLES: Mapping[str, tuple[str, Mapping[str, Family]]] = {
    "The engine": (
        (
            "Counted by the engine. Counters and histograms go on where they were when it is restarted; "
            "gauges are 0 while there is none."
        ),
        ENGINE,
    ),
    "The API": (
        "Each API process counts for itself; `/metrics` shows the sum over those of one `serve`.",
        API,
    ),
    "The whole system": ("Every API shows the same: take `max`, not `sum`, over instances.", FLEET),
    "Several processes": ("The label says whose; those of a worker are on its own port.", SHARED),
    "A worker's own port": (
        (
            "With `--metrics-port`; its memory, its calls of the store and those of the processes that "
            "train for it, and `polypeft_build_info` are there as well."
        ),
        WORKER,
    ),
}


def with_tables(page: str) -> str:
    """The page with the tables of now after its introduction."""
    return page[: page.index("## ")] + tables()


def tables() -> str:
    """All families as Markdown tables."""
    parts = []
    for title, (text, families) in TABLES.items():
        rows = [_row(family) for family in families.values()]
        parts.append(
            "\n".join([f"## {title}", "", text, "", "| name | type | labels | |", "|---|---|---|---|", *rows])
        )
    rows = [f"| `{label}` | {bound} |" for label, bound in OPEN.items()]
    parts.append(
        "\n".join(["## Labels without a fixed list", "", "| label | bounded by |", "|---|---|", *rows])
    )
    return "\n\n".join(parts) + "\n"


def _row(family: Family) -> str:
    labels = ", ".join(
        f"`{label}`" + (f" = {' '.join(values)}" if values else "")
        for label, values in family.all_labels.items()
    )
    return f"| `{family.shown}` | {family.kind} | {labels} | {family.help} |"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
