"""Every query that deploy/ holds, and the metrics and labels that it names."""

import json
import re
from typing import NamedTuple

from tests.deploy.prometheus import DEPLOY, rules

DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
SELECTOR = re.compile(r"\b((?:vllm:|polypeft[:_])[a-zA-Z0-9_:]+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPED = re.compile(r"\b(?:by|on|without)\s*\(([^)]*)\)")
TARGET_LABELS = {"instance", "job", "namespace", "pod", "le"}  # Prometheus's own


class Query(NamedTuple):
    where: str
    text: str
    legend: str = ""
    unit: str = ""

    @property
    def labels(self) -> set[str]:
        """Named in the legend."""
        return set(re.findall(r"{{(\w+)}}", self.legend))


def panels() -> list[Query]:
    """Every panel's, the dashboard's variables put in as Grafana would for "All"."""
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                text = target["expr"].replace("$__rate_interval", "10s")
                text = re.sub(r"\$(instance|tenant|adapter)", ".*", text)
                unit = panel["fieldConfig"]["defaults"]["unit"]
                found.append(Query(f"{path.stem}: {panel['title']}", text, target["legendFormat"], unit))
    return found


def recordings() -> list[Query]:
    return [Query(rule["record"], rule["record"]) for rule in rules("rules")]


def conditions() -> list[Query]:
    """What rules and alerts compute."""
    return [Query(r.get("alert") or r["record"], r["expr"]) for n in ("rules", "alerts") for r in rules(n)]


def named(text: str) -> list[tuple[str, set[str]]]:
    """Metrics of a query with the labels matched on each."""
    return [(name, set(MATCHER.findall(inside))) for name, inside in SELECTOR.findall(text)]


def grouped(text: str) -> set[str]:
    """Labels that a query's aggregations keep."""
    return {label.strip() for group in GROUPED.findall(text) for label in group.split(",") if label.strip()}
