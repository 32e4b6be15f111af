"""The table of docs/compatibility.md that compares the fields of requests with those of OpenAI's document.

python -m tests.clients.fields writes it.
"""

import json
from pathlib import Path
from typing import Any

from server.api.app import ROUTERS
from server.api.routes.docs import Docs
from tests.clients.table import DOCUMENT, replaced

OPENAI = Path(__file__).resolve().parents[1] / "golden" / "openai_schemas.json"
MARK = "fields"


def fields_table() -> str:
    """For each route: which of OpenAI's fields it takes and which it does not, and its further ones."""
    document = Docs([module.router for module in ROUTERS]).document
    lines = ["| route | taken | not taken | taken beside OpenAI's |", "|---|---|---|---|"]
    for path, theirs in json.loads(OPENAI.read_text())["x-request-fields"].items():
        ours = _fields(document, path)
        taken = [name for name in theirs if name in ours]
        missing = [name for name in theirs if name not in ours]
        further = sorted(ours - set(theirs))
        lines.append(f"| `POST {path}` | {_names(taken)} | {_names(missing)} | {_names(further)} |")
    return "\n".join(lines) + "\n"


def _fields(document: dict[str, Any], path: str) -> set[str]:
    """Of the body of a POST; `a[b]` of a form is `a`."""
    (content,) = document["paths"][path]["post"]["requestBody"]["content"].values()
    schema = content["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return {name.partition("[")[0] for name in schema["properties"]}


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


if __name__ == "__main__":
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(), MARK, fields_table()))
