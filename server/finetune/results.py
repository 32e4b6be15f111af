"""A training as files: its figures by step as CSV, with OpenAI's columns, and its losses as a picture."""

import csv
from pathlib import Path

from server.finetune.history import History

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
MAX_POINTS = 400  # of the drawn training curve; more would be a band, not a line


def write_metrics(history: History, path: Path) -> None:
    """One line a step; the last two columns are empty where nothing was evaluated."""
    evaluations = {e.step: (f"{e.loss:.6f}", f"{e.accuracy:.6f}") for e in history.evaluations}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for s in history.steps:
            valid = evaluations.get(s.step, ("", ""))
            writer.writerow([s.step, f"{s.loss:.6f}", f"{s.accuracy:.6f}", *valid])


def draw_losses(history: History, path: Path, *, base_loss: float | None = None) -> None:
    """PNG: loss on the training data by step, on held-out examples, and that of the base there."""
    from matplotlib.figure import Figure  # takes half a second, which only who draws should pay
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [s.step for s in history.steps]
    losses = [s.loss for s in history.steps]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    smooth = _means(steps, losses, max(1, len(steps) // 40))
    axes.plot(*smooth, color="tab:blue", label="training")
    if history.evaluations:
        points = [(e.step, e.loss) for e in history.evaluations]
        axes.plot(*zip(*points, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
    if best := history.best:
        axes.plot(best.step, best.loss, "*", color="tab:red", markersize=13, label=f"best: step {best.step}")
    if base_loss is not None:
        axes.axhline(base_loss, color="gray", linestyle="--", linewidth=1, label="base, held out")
    axes.set(xlabel="step", ylabel="loss per token", xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)


def _means(steps: list[int], losses: list[float], width: int) -> tuple[list[int], list[float]]:
    """The mean of the last `width` losses at every step, thinned to MAX_POINTS."""
    ahead = [0.0]
    for loss in losses:
        ahead.append(ahead[-1] + loss)
    stride = max(1, len(steps) // MAX_POINTS)
    shown = range(len(steps) - 1, -1, -stride)[::-1]
    means = [(ahead[i + 1] - ahead[max(0, i + 1 - width)]) / min(i + 1, width) for i in shown]
    return [steps[i] for i in shown], means
