"""What `--quantize int8` costs: perplexity on real text, float32 beside int8, by the kernels that serve.

    python -m benchmarks.perplexity                  # two minutes; prints a table, writes JSON

The text is documentation out of Python's standard library and, where Debian's package can be had, fortunes;
nobody trained this base on our copies of them, but it may have read either. Windows of equal length, each
token predicted from those before it in its window.
"""

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.arms import quiet
from benchmarks.tasks import TASKS, shuffled
from server.base.default_model import ensure_default_model
from server.base.text import Tokenizer
from server.engine.frozen import FrozenModel, Placement
from server.engine.linear import LAYOUTS, Layout
from server.finetune.attention import TrainingStep, attend_within

CACHE = Path(__file__).resolve().parents[1] / ".cache"
SOURCES = ("titles", "style")


def main(
    window: int = 512,
    windows: Annotated[int, typer.Option(help="Of each source, at most.")] = 24,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("perplexity.json"),
) -> None:
    """Measure each source under each layout, print a table, write JSON."""
    quiet()
    torch.set_num_threads(threads)
    folder = ensure_default_model(CACHE)
    tokenizer = Tokenizer.load(folder)
    texts = {source: torch.tensor(tokenizer.encode("\n\n".join(text_of(source)))) for source in SOURCES}
    found: dict[str, dict[str, float]] = {}
    for layout in LAYOUTS:
        found[layout] = {
            source: perplexity(folder, layout, torch.split(tokens, window)[:windows])
            for source, tokens in texts.items()
        }
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": folder.name,
        "window": window,
        "tokens": {source: min(len(tokens), window * windows) for source, tokens in texts.items()},
        "perplexity": found,
        "ratio": {source: found["int8"][source] / found["float32"][source] for source in texts},
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("text", "tokens", *LAYOUTS, "int8 / float32")
    for source in texts:
        values = [f"{found[layout][source]:.3f}" for layout in LAYOUTS]
        table.add_row(source, str(report["tokens"][source]), *values, f"{report['ratio'][source]:.4f}")  # type: ignore[index]
    Console().print(table)


def text_of(source: str) -> Iterator[str]:
    """What that task's lines say, in an order that depends on nothing but the lines."""
    for line in map(json.loads, shuffled(json.dumps(line) for _group, line in TASKS[source].make())):
        yield line["text"] if "text" in line else "\n".join(m["content"] for m in line["messages"][::-1])


@torch.inference_mode()
def perplexity(folder: Path, layout: Layout, windows: tuple[torch.Tensor, ...]) -> float:
    step = TrainingStep()
    placement = Placement(torch.device("cpu"), torch.float32, layout)
    model = FrozenModel(folder, folder.name, placement, step, attend_within).model
    losses = []
    for tokens in windows:
        step.lengths = [len(tokens)]
        positions = torch.arange(len(tokens))[None]
        logits = model(input_ids=tokens[None], position_ids=positions, use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


if __name__ == "__main__":
    typer.run(main)
