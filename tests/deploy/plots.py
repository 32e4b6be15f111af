"""Pictures of what a Prometheus recorded: the main panels, as an operator would see them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from PIL import Image

from tests.deploy.plant import FIRING, Prometheus
from tests.deploy.queries import Query, panels

MAIN = {
    "fleet": (
        "Requests by status",
        "Time to first token",
        "Where a row waits",
        "Rows",
        "A step's time by phase",
        "Hit ratio",
        "Load of an adapter, p95",
        "Evictions",
        "KV cache in use",
    ),
    "tenants": ("Rows a second", "Mean wait of a row", "Cold starts"),
    "tuning": ("Unfinished jobs", "Loss by worker", "Updates by worker"),
}
UNITS = {"short": "", "reqps": "requests a second", "percentunit": "share", "s": "seconds"}
WIDTH = 3  # panels in a line


def draw(prometheus: Prometheus, folder: Path) -> None:
    """One picture a dashboard, and one of the alerts."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    for board, titles in MAIN.items():
        lines = -(-len(titles) // WIDTH)
        size = (18, 3.2 * lines)
        figure, axes = plt.subplots(lines, WIDTH, figsize=size, sharex=True, layout="constrained")
        for title, axis in zip(titles, axes.flat, strict=True):
            _panel(axis, title, prometheus, [q for q in panels() if q.where == f"{board}: {title}"])
        _save(figure, axes.flat[-WIDTH:], folder / f"{board}.png")
    figure, axis = plt.subplots(figsize=(18, 4), layout="constrained")
    _alerts(axis, prometheus)
    _save(figure, [axis], folder / "alerts.png")
    plt.close("all")


def _panel(axis: Any, title: str, prometheus: Prometheus, queries: list[Query]) -> None:
    for query in queries:
        for series in prometheus.over_time(query.text):
            times, values = zip(*_points(prometheus, series), strict=True)
            if any(value == value for value in values):
                axis.plot(times, values, label=_label(query.legend, series["metric"]), linewidth=1.2)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_ylabel(UNITS[queries[0].unit], fontsize=8)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _alerts(axis: Any, prometheus: Prometheus) -> None:
    """A bar while an alert fires."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for series in prometheus.over_time(FIRING):
        bars = spans.setdefault(series["metric"]["alertname"].removeprefix("Polypeft"), [])
        bars += [(time, 1.0) for time, _ in _points(prometheus, series)]
    names = sorted(spans, key=lambda name: min(spans[name]), reverse=True)
    for at, name in enumerate(names):
        axis.broken_barh(spans[name], (at - 0.35, 0.7))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title("Alerts that fire", fontsize=10, loc="left")
    axis.set_xlim(left=0)


def _points(prometheus: Prometheus, series: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds since the beginning, and value."""
    return [(float(time) - prometheus.start_time, float(value)) for time, value in series["values"]]


def _label(legend: str, labels: dict[str, str]) -> str:
    """As Grafana fills it in, long values cut."""
    return re.sub(r"{{(\w+)}}", lambda found: labels[found[1]][:16], legend)


def _save(figure: Any, bottom: Iterable[Any], path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    for axis in bottom:
        axis.set_xlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=70)
    Image.open(path).quantize(64).save(path)  # a third of the bytes
