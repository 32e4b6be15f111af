"""The table of docs/compatibility.md: a row for each client, a column for each feature."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: make clients -->", "<!-- end of the table -->"
FIRST = ("chat", "adapter", "stream", "structured output", "tools", "responses")
OTHERS = "also"


def write_table(rows: dict[str, dict[str, str | None]]) -> None:
    """Write the table between its marks in the document."""
    text = DOCUMENT.read_text()
    head, rest = text.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(rows)}{END}{tail}")


def table(rows: dict[str, dict[str, str | None]]) -> str:
    """In Markdown. `-`: the client was not asked to; faults follow as a list."""
    lines = [f"| client | {' | '.join(FIRST)} | {OTHERS} |", "|---" * (len(FIRST) + 2) + "|"]
    faults = []
    for name, results in rows.items():
        cells = [_cell(results[feature]) if feature in results else "-" for feature in FIRST]
        also = [f"{feature} {_cell(results[feature])}" for feature in results if feature not in FIRST]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(also)} |")
        faults += [f"- {name}, {feature}: {_short(fault)}" for feature, fault in results.items() if fault]
    return (
        "\n".join(lines)
        + "\n\nWhat failed, in the client's words:\n\n"
        + "\n".join(faults or ["- nothing"])
        + "\n"
    )


def _cell(fault: str | None) -> str:
    return "yes" if fault is None else "**no**"


def _short(fault: str) -> str:
    """One line, without the text of requests and paths of a machine."""
    line = re.sub(r"\s+", " ", fault)
    return "`" + re.sub(r"/(?:[\w.@-]+/)+", "", line)[:160].replace("`", "'").replace("|", "/") + "`"
