"""Verdicts as the tables of docs/bases.md."""

import re
from collections.abc import Iterable
from pathlib import Path

from tests.families.verdict import STAGES, Verdict

BEGIN, END = "<!-- verdicts -->\n", "<!-- /verdicts -->\n"


def write_table(document: Path, verdicts: Iterable[Verdict]) -> None:
    """Put the tables between the document's two marks."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    found = sorted(verdicts, key=lambda verdict: verdict.name)
    document.write_text(f"{before}{BEGIN}\n{_exact(found)}\n{_refused(found)}\n{END}{after}")


def _exact(verdicts: list[Verdict]) -> str:
    lines = [f"| family | {' | '.join(STAGES)} |", f"|---|{'---|' * len(STAGES)}"]
    for verdict in verdicts:
        if verdict.outcome != "refused":
            name = verdict.name if verdict.outcome == "exact" else f"{verdict.name} ({verdict.outcome})"
            figures = [f"{verdict.errors[stage]:.0e}" if stage in verdict.errors else "" for stage in STAGES]
            lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _refused(verdicts: list[Verdict]) -> str:
    reasons: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.outcome == "refused":
            reasons.setdefault(_reason(verdict.detail), []).append(verdict.name)
    lines = ["| refused, since | families |", "|---|---|"]
    for reason, names in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        lines.append(f"| {reason} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def _reason(detail: str) -> str:
    """Without the architecture, and without what differs from one family to the next."""
    reason = detail.partition(" cannot be served: ")[2].rstrip(".") or detail
    reason = re.sub(r"its attention \S+\.\S+ looks", "its attention looks", reason)
    reason = re.sub(r"\d\.\de[+-]\d\d of", "so much of", reason)
    return reason.replace("|", "\\|")
