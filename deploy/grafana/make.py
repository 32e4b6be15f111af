"""Writes dashboards/*.json, which Grafana reads: `python -m deploy.grafana.make`. Tests compare them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from deploy.grafana.fleet import FLEET
from deploy.grafana.panels import Panel
from deploy.grafana.tenants import TENANTS
from deploy.grafana.tuning import TUNING

FOLDER = Path(__file__).parent / "dashboards"
WIDTH, HEIGHT, ROW = 8, 7, 3  # of a panel in Grafana's grid, and panels in a line
SOURCE = {"type": "prometheus", "uid": "$datasource"}


class Variable(NamedTuple):
    name: str
    label: str
    query: str


INSTANCE = Variable("instance", "Server", 'label_values(up{job=~"polypeft.*"}, instance)')
DASHBOARDS: dict[str, tuple[str, str, list[Variable], dict[str, list[Panel]]]] = {
    "fleet": ("Polypeft: fleet", "Is it well, who waits, and for what? Begin here.", [INSTANCE], FLEET),
    "tenants": (
        "Polypeft: tenants and adapters",
        "Who is slow, who is cold, who is failing? Needs --metrics-adapter-labels.",
        [
            INSTANCE,
            Variable("tenant", "Tenant", "label_values(polypeft_tenant_requests_total, tenant)"),
            Variable(
                "adapter",
                "Adapter",
                'label_values(polypeft_adapter_requests_total{tenant=~"$tenant"}, adapter)',
            ),
        ],
        TENANTS,
    ),
    "tuning": ("Polypeft: fine-tuning", "Jobs, workers, and how training goes.", [INSTANCE], TUNING),
}


def dashboard(name: str) -> dict[str, Any]:
    """What Grafana 11 and later read."""
    title, text, variables, rows = DASHBOARDS[name]
    return {
        "uid": f"polypeft-{name}",
        "title": title,
        "description": text,
        "tags": ["polypeft"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"title": "Polypeft", "type": "dashboards", "tags": ["polypeft"], "asDropdown": True}],
        "templating": {"list": [_datasource(), *map(_variable, variables)]},
        "panels": _panels(rows),
    }


def _panels(rows: dict[str, list[Panel]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
            }
        )
        y += 1
        for at, panel in enumerate(panels):
            place = {"h": HEIGHT, "w": WIDTH, "x": at % ROW * WIDTH, "y": y + at // ROW * HEIGHT}
            found.append(_panel(panel, len(found) + 1, place))
        y += -(-len(panels) // ROW) * HEIGHT
    return found


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.limits:
        steps = zip(("green", "yellow", "red"), (None, *panel.limits), strict=True)
        defaults["thresholds"] = {"mode": "absolute", "steps": [{"color": c, "value": v} for c, v in steps]}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for at, (query, legend) in enumerate(panel.queries)
        ],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def text_of(name: str) -> str:
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(text_of(name))
