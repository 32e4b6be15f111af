"""The result files of a training: metrics by step as CSV, with OpenAI's columns, and a plot of its losses."""

import csv
from pathlib import Path
from typing import Any

from server.finetune.training.observer import TrainingLog

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
LOG_SCALE_RATIO = 10  # the axis is logarithmic if it reaches above this times the best loss
MAX_POINTS = 400  # of the drawn training curve; more would be a band, not a line


def write_metrics(log: TrainingLog, path: Path) -> None:
    """One line for each step; the last two columns are empty for steps without an evaluation."""
    evaluations = {e.step: (f"{e.loss:.6f}", f"{e.accuracy:.6f}") for e in log.evaluations}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for s in log.steps:
            valid = evaluations.get(s.step, ("", ""))
            writer.writerow([s.step, f"{s.loss:.6f}", f"{s.accuracy:.6f}", *valid])


def draw_losses(log: TrainingLog, path: Path, *, base_loss: float | None = None) -> None:
    """A PNG of the training loss and the held-out loss by step, and the base's held-out loss."""
    from matplotlib.figure import Figure  # takes half a second to import
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [s.step for s in log.steps]
    losses = [s.loss for s in log.steps]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    width = max(1, len(steps) // 15)
    smooth = _means(steps, losses, width)
    label = f"training, mean of {width} steps" if width > 1 else "training"
    axes.plot(*smooth, color="tab:blue", label=label)
    held_out = [e.loss for e in log.evaluations]
    if held_out:
        points = ([e.step for e in log.evaluations], held_out)
        axes.plot(*points, color="tab:orange", marker="o", markersize=4, label="held out")
    if best := log.best:
        kept = f"best: {best.loss:.3g} at step {best.step}"
        axes.plot(best.step, best.loss, "*", color="tab:red", markersize=13, label=kept)
    if base_loss is not None:
        label = f"base, held out: {base_loss:.3g}"
        axes.axhline(base_loss, color="gray", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="loss per token", xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes, [*smooth[1], *held_out, *([] if base_loss is None else [base_loss])], held_out)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)


def _scale(axes: Any, drawn: list[float], held_out: list[float]) -> None:
    """Set the y axis up to the highest smoothed loss, logarithmic if the best loss were near its bottom."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    top = 1.1 * max(drawn, default=1.0)
    best = min(held_out, default=0.0)
    if not 0 < best < top / LOG_SCALE_RATIO:
        axes.set_ylim(0, top)
        return
    axes.set_yscale("log")
    axes.set_ylim(best / 3, top)  # the losses of single batches may be far lower
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _means(steps: list[int], losses: list[float], width: int) -> tuple[list[int], list[float]]:
    """The moving average over `width` losses, at MAX_POINTS of the steps at most."""
    sums = [0.0]  # sums[i] is that of the first i losses
    for loss in losses:
        sums.append(sums[-1] + loss)
    stride = max(1, len(steps) // MAX_POINTS)
    shown = range(len(steps) - 1, -1, -stride)[::-1]
    means = [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in shown]
    return [steps[i] for i in shown], means
