"""Trained tokens per second and the loss reached: ours, and PEFT's in transformers.Trainer.

    python -m benchmarks.training                                # LoRA on attention; five minutes or so
    python -m benchmarks.training --method lora --method lora-all --method prefix --method prompt
    python -m benchmarks.training --targets all                  # learn every token, not answers alone

The same tensors to start from, data, batches, seed and hyperparameters on both sides, fp32. The two take
turns of a few steps, so that a slow minute of the machine hits both; a turn's tokens are the same for both,
so its ratio of times is the ratio of speeds. Medians are shown; the first turn, which warms up, counts for
the losses only. Tokens are those of the examples: no padding, no virtual token.
"""

import json
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.support.arms import quiet
from benchmarks.support.machine import Machine, Work, measure, work_of
from benchmarks.support.trainers import SIDES, Job, Remote, Turn, ours
from benchmarks.tasks import lines_of
from server.base_model.default_model import ensure_default_model
from server.base_model.tokenizer import Tokenizer
from server.finetune.data.dataset import load
from server.finetune.data.examples import Example
from server.finetune.recipe import Recipe
from server.finetune.recipe_methods import LoraRecipe, Peft, PrefixRecipe, PromptRecipe

CACHE = Path(__file__).resolve().parents[1] / ".cache"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
METHODS: dict[str, Peft] = {
    "lora": LoraRecipe(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=ATTENTION),
    "lora-all": LoraRecipe(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=(*ATTENTION, "gate_proj", "up_proj", "down_proj"),
    ),
    "lora-no-dropout": LoraRecipe(r=16, lora_alpha=32, lora_dropout=0, target_modules=ATTENTION),
    "prefix": PrefixRecipe(num_virtual_tokens=20),
    "prompt": PromptRecipe(num_virtual_tokens=20),
}
TASK = "titles"
TAIL = 20  # steps whose mean is the training loss at the end
Targets = Literal["answers", "all"]


@dataclass
class Trained:
    """One side of one method."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [loss for turn in self.turns for loss in turn.losses]

    @property
    def final(self) -> float:
        return statistics.fmean(self.losses[-TAIL:])

    @property
    def held_out(self) -> float:
        found = self.turns[-1].held_out
        assert found is not None, "the last turn has it"
        return found


@dataclass
class Comparison:
    method: str
    tokens: list[int]  # of each turn
    sides: dict[str, Trained]

    def speeds(self, side: str) -> list[float]:
        """Tokens per second of each turn that counts."""
        pairs = list(zip(self.tokens, self.sides[side].turns, strict=True))
        return [tokens / turn.seconds for tokens, turn in pairs[1:]]

    def speed(self, side: str) -> float:
        return statistics.median(self.speeds(side))

    @property
    def ratio(self) -> float:
        pairs = zip(self.speeds("polypeft"), self.speeds("peft"), strict=True)
        return statistics.median(a / b for a, b in pairs)

    def figures(self) -> dict[str, Any]:
        shown = {
            name: {
                "tokens_per_s": round(self.speed(name), 1),
                "each_turn": [round(speed, 1) for speed in self.speeds(name)],
                "train_loss": side.final,
                "held_out_loss": side.held_out,
                "losses": [round(loss, 5) for loss in side.losses],
            }
            for name, side in self.sides.items()
        }
        return {"method": self.method, "ratio": round(self.ratio, 3)} | shown


def main(
    method: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(METHODS)}.")] = None,
    steps: int = 120,
    batch_size: int = 4,
    steps_a_turn: int = 10,
    held_out: Annotated[int, typer.Option(help="Examples to evaluate both on at the end.")] = 40,
    targets: Targets = "answers",
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="The JSON; the picture lies beside it.")] = Path(
        "training.json"
    ),
) -> None:
    """Train, compare, print a table, write JSON and PNG."""
    quiet()
    folder = ensure_default_model(CACHE)
    machine = measure(threads)
    compared = []
    with tempfile.TemporaryDirectory(prefix="polypeft-training-") as scratch:
        examples, others = data(folder, Path(scratch), steps * batch_size, held_out, targets)
        for name in method or ["lora"]:
            own = recipe(METHODS[name], batch_size)
            place = Path(scratch) / name
            job = Job(folder, own, examples, others, place / "start", place, threads, steps_a_turn)
            ours(job).save(job.start)
            compared.append(compare(name, job))
    bound = floor(machine, work_of(folder), examples)
    Console().print(table(machine, compared, bound))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "job": {"task": TASK, "targets": targets, "steps": steps, "batch_size": batch_size}
        | {"tokens": sum(len(e.tokens) for e in examples), "model": folder.name},
        "bound_tokens_per_s": round(bound, 1),
        "methods": [own.figures() for own in compared],
    }
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(machine, compared, output.with_suffix(".png"))


def data(
    model: Path, scratch: Path, count: int, held_out: int, targets: Targets
) -> tuple[list[Example], list[Example]]:
    """(to train on, held out), tokenised as a job's are."""
    tokenizer = Tokenizer.load(model)
    sides = []
    for name, lines in zip(("train", "test"), lines_of(TASK), strict=True):
        path = scratch / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        sides.append(load(path, tokenizer, 1024))
    train, test = sides[0][:count], sides[1][:held_out]
    if len(train) < count:
        raise typer.BadParameter(
            f"{TASK} has {len(train)} examples, and {count} are needed", param_hint="steps"
        )
    if targets == "all":
        train, test = (
            [Example(e.tokens, [0.0] + [1.0] * (len(e.tokens) - 1)) for e in s] for s in (train, test)
        )
    return train, test


def recipe(peft: Peft, batch_size: int) -> Recipe:
    return Recipe(
        peft=peft,
        n_epochs=1,
        batch_size=batch_size,
        learning_rate=peft.default_learning_rate,
        early_stopping=0,
        max_tokens=1024,
        max_seconds=24 * 3600,
        seed=1,
    )


def compare(name: str, job: Job) -> Comparison:
    total = job.recipe.steps(len(job.examples))
    sides = {side: Trained() for side in SIDES}
    tokens = tokens_of_turns(job)
    with ExitStack() as stack, Progress(transient=True) as progress:
        bar = progress.add_task(name, total=total)
        remotes = {side: Remote(side, job) for side in SIDES}
        for remote in remotes.values():
            stack.callback(remote.close)
        for at in range(len(tokens)):
            for side in list(SIDES)[:: 1 if at % 2 else -1]:
                sides[side].turns.append(remotes[side].turn())
            progress.update(bar, advance=job.steps_a_turn)
    return Comparison(name, tokens, sides)


def tokens_of_turns(job: Job) -> list[int]:
    from server.finetune.data.batching import LengthGroupedBatches

    lengths = [len(e.tokens) for e in job.examples]
    batches = list(LengthGroupedBatches(lengths, job.recipe.batch_size, job.recipe.seed))
    counts = [sum(lengths[i] for i in own) for own in batches]
    return [sum(counts[at : at + job.steps_a_turn]) for at in range(0, len(counts), job.steps_a_turn)]


def floor(machine: Machine, work: Work, examples: list[Example]) -> float:
    """Tokens per second at most: the base's GEMMs alone, at the speed of a large one.

    Forward and the gradient upon inputs are 2 FLOPs each a parameter and token; of the head, which only
    tokens with a target pass, as well. Attention, the adapter and all else are free here.
    """
    tokens = sum(len(e.tokens) for e in examples)
    targets = sum(sum(map(bool, e.weights)) for e in examples)
    flops = 4 * ((work.parameters - work.head_parameters) * tokens + work.head_parameters * targets)
    return tokens / (flops / (machine.sgemm_gflop_per_s * 1e9))


def table(machine: Machine, compared: list[Comparison], bound: float) -> Table:
    on = f"{machine.processor}, {machine.threads} threads, {machine.sgemm_gflop_per_s:.0f} GFLOP/s fp32"
    shown = Table(
        "method", "tokens/s", "PEFT", "ratio", "train loss", "PEFT", "held-out loss", "PEFT", title=on
    )
    for own in compared:
        a, b = own.sides["polypeft"], own.sides["peft"]
        speeds = (f"{own.speed('polypeft'):.0f}", f"{own.speed('peft'):.0f}", f"{own.ratio:.2f}")
        losses = (a.final, b.final, a.held_out, b.held_out)
        shown.add_row(own.method, *speeds, *(f"{loss:.4f}" for loss in losses))
    shown.add_section()
    shown.add_row("bound", f"{bound:.0f}", style="dim")
    return shown


def draw(machine: Machine, compared: list[Comparison], path: Path) -> None:
    """A plot for each method: the loss over the seconds that each side has computed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(compared)), layout="constrained")
    for axes, own in zip(figure.subplots(len(compared), 1, squeeze=False)[:, 0], compared, strict=True):
        for name, side in own.sides.items():
            seconds, losses, now = [], [], 0.0
            for turn in side.turns:
                now += turn.seconds
                seconds.append(now)
                losses.append(statistics.fmean(turn.losses))
            label = f"{name}: {own.speed(name):.0f} tokens/s, held out {side.held_out:.3f}"
            axes.plot(seconds, losses, marker="o", markersize=3, label=label)
        axes.set(xlabel="seconds of its own turns", ylabel="training loss", title=own.method)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{machine.processor}, {machine.threads} threads, fp32", fontsize=10)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)
