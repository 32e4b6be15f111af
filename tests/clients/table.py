"""The table of docs/compatibility.md: a row for each client, a column for each feature."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
MARK = "clients"
FIRST = ("chat", "adapter", "stream", "structured output", "tools", "responses")
OTHERS = "also"


def write_table(rows: dict[str, dict[str, str | None]]) -> None:
    """Write the table between its marks in the document."""
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), MARK, table(rows)))


def replaced(text: str, mark: str, new: str) -> str:
    """`text` with `new` between the marks of this name."""
    begin, end = f"<!-- begin {mark} -->", f"<!-- end {mark} -->"
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{new}{end}{rest.split(end, 1)[1]}"


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
