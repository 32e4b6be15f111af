import csv
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from server.finetune.training.observer import TrainingLog
from server.finetune.training.reports import COLUMNS, _scale, draw_losses, write_metrics
from tests.server.finetune.training.test_observer import history


def test_metrics_are_one_line_a_step_with_openais_columns(tmp_path: Path) -> None:
    write_metrics(history([2.0, 1.5, 1.25], {2: 1.75}), tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [line["step"] for line in lines] == ["1", "2", "3"]
    assert [line["train_loss"] for line in lines] == ["2.000000", "1.500000", "1.250000"]
    assert [line["valid_loss"] for line in lines] == ["", "1.750000", ""]
    assert [line["valid_mean_token_accuracy"] for line in lines] == ["", "0.500000", ""]


@pytest.mark.parametrize(
    "drawn",
    [
        history([5 / (i + 1) for i in range(3000)], {500 * i: 1 / i for i in range(1, 7)}),
        history([1.0], {}),
        TrainingLog(),
    ],
    ids=["long", "one step", "nothing"],
)
def test_losses_are_drawn_as_a_png(tmp_path: Path, drawn: TrainingLog) -> None:
    draw_losses(drawn, tmp_path / "losses.png", base_loss=2.0)
    assert (tmp_path / "losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("drawn", "held_out", "scale", "limits"),
    [
        ([9.0, 0.4, 8.0], [2.0, 0.6], "log", (0.2, 9.9)),  # what the best loss rises to later must be seen
        ([3.0, 2.0], [2.5], "linear", (0.0, 3.3)),
        ([3.0, 0.0], [0.0], "linear", (0.0, 3.3)),
        ([], [], "linear", (0.0, 1.1)),
    ],
)
def test_the_axis_of_losses_shows_the_best_one(
    drawn: list[float], held_out: list[float], scale: str, limits: tuple[float, float]
) -> None:
    axes = Figure().subplots()
    _scale(axes, drawn, held_out)
    assert axes.get_yscale() == scale
    assert axes.get_ylim() == pytest.approx(limits)
