"""A run's figures: as a table, as JSON, as a picture."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.support.machine import Machine


@dataclass
class Cell:
    """One arm at one number of rows."""

    arm: str
    rows: int
    seconds: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    compared_rows: int = 0  # rows for which an oracle ran
    equal_rows: int = 0  # of those, the ones with the oracle's tokens

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_s)

    @property
    def shown(self) -> str:
        if not self.compared_rows:
            return f"{self.median:.1f}"
        colour = "green" if self.equal_rows == self.compared_rows else "red"
        return f"{self.median:.1f} [{colour}]{self.equal_rows}/{self.compared_rows}[/]"


@dataclass(frozen=True)
class Report:
    date: str  # ISO 8601, UTC
    machine: Machine
    job: dict[str, Any]
    floor_tokens_per_s: dict[str, dict[int, float]]  # what "base" and "lora" rows could reach at most
    cells: list[Cell]

    def table(self) -> Table:
        counts = sorted({cell.rows for cell in self.cells})
        m = self.machine
        on = (
            f"{m.processor}, {m.threads} threads, {m.instructions}, {m.read_gb_per_s:.0f} GB/s read, "
            f"{m.sgemm_gflop_per_s:.0f} GFLOP/s fp32; green, red: rows whose greedy tokens are the oracle's"
        )
        table = Table(title="New tokens per second", caption=on)
        table.add_column("arm")
        for rows in counts:
            table.add_column(f"{rows} rows", justify="right")
        for arm in dict.fromkeys(cell.arm for cell in self.cells):
            by_rows = {cell.rows: cell.shown for cell in self.cells if cell.arm == arm}
            table.add_row(arm, *(by_rows.get(rows, "-") for rows in counts))
        table.add_section()
        for kind, floors in self.floor_tokens_per_s.items():
            table.add_row(f"bound, {kind} rows", *(f"{floors[rows]:.1f}" for rows in counts), style="dim")
        table.add_section()
        for name, ratios in self.ratios().items():
            table.add_row(name, *(f"{ratios[rows]:.2f}" if rows in ratios else "-" for rows in counts))
        return table

    def ratios(self) -> dict[str, dict[int, float]]:
        """The comparisons that matter, where both arms ran."""
        pairs = [
            ("polypeft-lora", "peft-mixed"),
            ("polypeft-lora", "peft-switch"),
            ("int8-lora", "peft-mixed"),
            ("polypeft-lora", "polypeft-base"),
            ("polypeft-lora-bf16", "polypeft-base"),
            ("polypeft-base", "transformers"),
            ("polypeft-lora", "vllm-lora"),
            ("polypeft-base", "vllm-base"),
        ]
        speed = {(cell.arm, cell.rows): cell.median for cell in self.cells}
        found: dict[str, dict[int, float]] = {}
        for ours, theirs in pairs:
            both = {
                n: v / speed[theirs, n]
                for (arm, n), v in speed.items()
                if arm == ours and (theirs, n) in speed
            }
            if both:
                found[f"{ours} / {theirs}"] = both
        return found

    def write(self, path: Path) -> None:
        data = asdict(self) | {"ratios": self.ratios()}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    def draw(self, path: Path) -> None:
        """Tokens per second by rows, one line an arm, as PNG. Needs matplotlib, which only `dev` brings."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for arm in dict.fromkeys(cell.arm for cell in self.cells):
            points = sorted((cell.rows, cell.median) for cell in self.cells if cell.arm == arm)
            axes.plot(*zip(*points, strict=True), marker="o", label=arm)
        for kind, floors in self.floor_tokens_per_s.items():
            axes.plot(*zip(*sorted(floors.items()), strict=True), linestyle=":", label=f"bound, {kind} rows")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({cell.rows for cell in self.cells}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel="rows in the batch", ylabel="new tokens per second", ylim=(0, None))
        axes.set_title(f"{self.machine.processor}, {self.machine.threads} threads, fp32", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=150)
