import csv
from pathlib import Path

import pytest

from server.finetune.history import History
from server.finetune.results import COLUMNS, draw_losses, write_metrics
from tests.server.finetune.test_history import history


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
        History(),
    ],
    ids=["long", "one step", "nothing"],
)
def test_losses_are_drawn_as_a_png(tmp_path: Path, drawn: History) -> None:
    draw_losses(drawn, tmp_path / "losses.png", base_loss=2.0)
    assert (tmp_path / "losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
