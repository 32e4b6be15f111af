"""What rounding costs: perplexity on real text, float32 beside `--quantize int8` and `--lora-dtype bfloat16`,
by the kernels that serve.

    python -m benchmarks.perplexity --windows 8      # three minutes; prints a table, writes JSON

Of the base: documentation out of Python's standard library and, where Debian's package can be had, fortunes;
nobody trained it on our copies of them, but it may have read either. Windows of equal length, each token
predicted from those before it in its window. Of the base with a LoRA on all linears: answers that were held
out when the LoRA was trained, just before, on others.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.support.arms import quiet
from benchmarks.support.trainers import Job, train_ours
from benchmarks.tasks import TASKS, shuffled
from benchmarks.training import METHODS, data, recipe
from server.adapters.methods.affine_bank import AffineBank
from server.adapters.methods.lora import Lora
from server.adapters.methods.token_spans import Span, TokenSpans
from server.base_model.default_model import ensure_default_model
from server.base_model.tokenizer import Tokenizer
from server.engine.model.base_model import FrozenModel, Placement
from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.attention import TrainingStep, attend_within
from server.kernels.weight_formats import INT8

CACHE = Path(__file__).resolve().parents[1] / ".cache"
SOURCES = ("titles", "style")
CPU = torch.device("cpu")
EXACT = "float32"
ARMS = {
    EXACT: Placement(CPU, torch.float32),
    "lora-bf16": Placement(CPU, torch.float32, lora_bfloat16=True),
    "int8": Placement(CPU, torch.float32, INT8),
}
BARE = (EXACT, "int8")  # those that tell the base apart
BATCH, HELD_OUT = 4, 200  # examples


def main(
    window: int = 512,
    windows: Annotated[int, typer.Option(help="Of each source, at most.")] = 24,
    steps: Annotated[int, typer.Option(help="Of four examples, for the LoRA.")] = 60,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("perplexity.json"),
) -> None:
    """Measure each text under each arm, print a table, write JSON."""
    quiet()
    torch.set_num_threads(threads)
    folder = ensure_default_model(CACHE)
    tokenizer = Tokenizer.load(folder)
    texts = {}
    for source in SOURCES:
        tokens = torch.tensor(tokenizer.encode("\n\n".join(text_of(source))))
        texts[source] = [whole(own.tolist()) for own in torch.split(tokens, window)[:windows]]
    with tempfile.TemporaryDirectory(prefix="polypeft-perplexity-") as scratch:
        trained, held_out = adapter(folder, Path(scratch), steps)
    found: dict[str, dict[str, float]] = {name: {} for name in [*texts, "answers, with a LoRA"]}
    for arm, placement in ARMS.items():
        subject = Subject(folder, placement)
        for source, examples in texts.items() if arm in BARE else ():
            found[source][arm] = subject.perplexity(examples)
        subject.wear(trained)
        found["answers, with a LoRA"][arm] = subject.perplexity(held_out)
    counted = [sum(sum(map(bool, e.weights)) for e in own) for own in (*texts.values(), held_out)]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": folder.name,
        "window": window,
        "steps": steps,
        "tokens": dict(zip(found, counted, strict=True)),
        "perplexity": found,
        "ratio": {
            name: {arm: value / own[EXACT] for arm, value in own.items()} for name, own in found.items()
        },
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    others = [arm for arm in ARMS if arm != EXACT]
    table = Table("text", "tokens", *ARMS, *(f"{arm} / {EXACT}" for arm in others))
    for (name, own), count in zip(found.items(), counted, strict=True):
        values = [f"{own[arm]:.3f}" if arm in own else "" for arm in ARMS]
        ratios = [f"{own[arm] / own[EXACT]:.4f}" if arm in own else "" for arm in others]
        table.add_row(name, str(count), *values, *ratios)
    Console().print(table)


def text_of(source: str) -> Iterator[str]:
    """What that task's lines say, in an order that depends on nothing but the lines."""
    for line in map(json.loads, shuffled(json.dumps(line) for _group, line in TASKS[source].make())):
        yield line["text"] if "text" in line else "\n".join(m["content"] for m in line["messages"][::-1])


def whole(tokens: list[int]) -> Example:
    """Each token but the first is a target."""
    return Example(tokens, [0.0] + [1.0] * (len(tokens) - 1))


def adapter(folder: Path, scratch: Path, steps: int) -> tuple[AdapterModel, list[Example]]:
    """A LoRA r16 on all linears, trained as a job would, and examples that it has not seen."""
    examples, held_out = data(folder, scratch, steps * BATCH, HELD_OUT, "answers")
    own = recipe(METHODS["lora-all"], BATCH)
    return train_ours(Job(folder, own, examples, held_out, scratch, scratch, 0, steps)), held_out


class Subject:
    """The base as a server would hold it."""

    def __init__(self, folder: Path, placement: Placement) -> None:
        self.placement = placement
        self.step = TrainingStep()
        self.frozen = FrozenModel(folder, folder.name, placement, self.step, attend_within)
        self.bank: AffineBank | None = None

    def wear(self, trained: AdapterModel) -> None:
        """With this adapter from now on, held as this placement says."""
        method, base = Lora(narrow=self.placement.narrow), self.frozen.base
        packed = method.pack(
            trained.adapter.spec, base, trained.state(), self.frozen.weights, self.placement.dtype
        )
        self.bank = AffineBank(base, 1, self.placement.device, self.placement.dtype)
        self.bank.put(1, packed)

    @torch.inference_mode()
    def perplexity(self, examples: Sequence[Example]) -> float:
        """Of the targets, all examples together."""
        losses = []
        for example in examples:
            ids, count = torch.tensor(example.tokens), len(example.tokens)
            self.step.lengths = [count]
            if self.bank:
                self.step.affine = [(self.bank, TokenSpans([Span(1, 0, count)], self.bank.max_span))]
            positions = torch.arange(count)[None]
            output = self.frozen.model(input_ids=ids[None], position_ids=positions, use_cache=False)
            own = F.cross_entropy(output.logits[0, :-1].float(), ids[1:], reduction="none")
            losses.append(own[torch.tensor(example.weights[1:]) > 0])
        return math.exp(float(torch.cat(losses).mean()))


if __name__ == "__main__":
    typer.run(main)
