"""Dashboards without Grafana: as their tables say, whole, told apart, and of metrics that exist."""

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.make import DASHBOARDS as TABLES
from deploy.grafana.make import text_of
from server.metrics.family import Family
from server.metrics.names import FAMILIES
from tests.deploy.prometheus import rules
from tests.deploy.queries import DASHBOARDS, TARGET_LABELS, Query, conditions, grouped, named, panels

UNITS = {"short", "reqps", "percentunit", "s", "bytes", "Bps"}


def names() -> dict[str, set[str]]:
    """Every series that /metrics can show, with its labels."""
    found: dict[str, set[str]] = {}
    for family in FAMILIES.values():
        for shown in series_of(family):
            found[shown] = set(family.all_labels) | TARGET_LABELS
    recorded = {rule["record"]: TARGET_LABELS | {"process"} for rule in rules("rules")}
    return found | recorded | {"up": TARGET_LABELS}


def series_of(family: Family) -> list[str]:
    if family.kind == "histogram":
        return [f"{family.name}_{end}" for end in ("bucket", "sum", "count")]
    return [family.shown]


@pytest.mark.parametrize("query", [*panels(), *conditions()], ids=lambda query: query.where)
def test_every_metric_and_label_exists(query: Query) -> None:
    known = names()
    found = named(query.text)
    assert found, query
    for name, labels in found:
        assert name in known, f"{name} in {query.where}"
        assert labels <= known[name], f"{labels - known[name]} of {name} in {query.where}"
    everywhere = set().union(*(known[name] for name, _ in found))
    assert grouped(query.text) <= everywhere


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_says_what_it_shows(path: Path) -> None:
    board = json.loads(path.read_text())
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert board["description"]
    assert len({panel["title"] for panel in shown}) == len(shown), "two panels have one title"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in shown:
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert not overlapping(board["panels"])


def overlapping(placed: list[dict[str, Any]]) -> set[tuple[int, int]]:
    """Cells of the grid that two panels claim."""
    taken: set[tuple[int, int]] = set()
    twice: set[tuple[int, int]] = set()
    for panel in placed:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        twice |= taken & cells
        taken |= cells
        assert at["x"] + at["w"] <= 24
    return twice


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_variable_of_a_query_is_offered(path: Path) -> None:
    text = path.read_text()
    board = json.loads(text)
    offered = {variable["name"] for variable in board["templating"]["list"]}
    used = {name for name in ("instance", "tenant", "adapter", "datasource") if f"${name}" in text}
    assert used <= offered
    assert board["uid"].startswith("polypeft-")


def test_the_files_are_what_their_tables_make() -> None:
    assert {path.stem for path in DASHBOARDS} == set(TABLES)
    for path in DASHBOARDS:
        assert path.read_text() == text_of(path.stem), "run python -m deploy.grafana.make"
