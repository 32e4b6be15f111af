"""Pictures of what a Prometheus recorded: the main panels, as an operator would see them."""

from pathlib import Path

import matplotlib as mpl

from tests.deploy.plant import Prometheus
from tests.deploy.queries import panels

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
    "tuning": ("Unfinished jobs", "Loss", "Tokens trained on"),
}


def draw(prometheus: Prometheus, folder: Path) -> None:
    """One picture a dashboard; three panels in a line."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    for board, titles in MAIN.items():
        lines = -(-len(titles) // 3)
        figure, axes = plt.subplots(lines, 3, figsize=(15, 3.2 * lines), squeeze=False, layout="constrained")
        for title, axis in zip(titles, axes.flat, strict=True):
            axis.set_title(title, fontsize=10, loc="left")
            axis.grid(alpha=0.3)
            for query in panels():
                if query.where != f"{board}: {title}":
                    continue
                for series in prometheus.over_time(query.text):
                    points = [(float(t) - prometheus.start_time, float(v)) for t, v in series["values"]]
                    label = " ".join(v[:12] for k, v in series["metric"].items() if not k.startswith("__"))
                    axis.plot(*zip(*points, strict=True), label=label or query.text[:40], linewidth=1.2)
            axis.set_ylim(bottom=0)
            axis.set_xlabel("seconds", fontsize=8)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7, loc="best")
        figure.savefig(folder / f"{board}.png", dpi=70)
        plt.close(figure)
