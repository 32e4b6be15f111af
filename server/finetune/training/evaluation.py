"""How well a model does on examples it was not trained on; the base and the adapted one side by side.

Nothing is generated: greedy decoding gives an answer exactly if each of its tokens is the likeliest after
those before it, and that is seen in one pass.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from server.finetune.data.batching import first_examples, packed_examples
from server.finetune.data.examples import Example
from server.finetune.modeling.adapter_model import AdapterModel
from server.finetune.modeling.batch_loss import NO_TARGET, Batch
from server.finetune.training.observer import TrainingLog

PACK_TOKENS = 1024  # of one forward pass, unless an example is longer
MAX_LABELS = 16  # where there are more different answers, they are no classes
LABEL_TOKENS = 30_000  # to find the likeliest label of as many examples as that is enough for
ONE_SIDED_95 = 1.645  # standard errors; by chance alone, one adapter in 20 is further ahead
MAX_LOSS = 80.0  # a perplexity stays a number


class EvalScores(msgspec.Struct, frozen=True):
    """By example."""

    losses: list[float]  # sum of weight * loss in nats
    weights: list[float]
    correct: list[int]  # targets that were the likeliest token
    targets: list[int]
    exact: list[bool]  # all of the last answer's were

    @property
    def loss(self) -> float:
        """Per target, by weight."""
        return math.fsum(self.losses) / math.fsum(self.weights)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / sum(self.targets)


@torch.no_grad()
def score(model: AdapterModel, examples: Sequence[Example], *, adapted: bool = True) -> EvalScores:
    """Dropout is off meanwhile, and no random number is drawn."""
    was = model.training
    model.eval()
    scores = EvalScores([], [], [], [], [])
    for pack in packed_examples(examples, PACK_TOKENS):
        batch = Batch.of(pack)
        output = model(batch, adapted=adapted)
        weights = batch.weights[batch.targets != NO_TARGET].double()
        counts = output.sequences.bincount(minlength=len(pack)).tolist()
        losses = output.losses.cpu().double() * weights
        parts = zip(
            torch.split(losses, counts),
            torch.split(weights, counts),
            torch.split(output.hits.cpu(), counts),
            strict=True,
        )
        for example, (loss, weight, hits) in zip(pack, parts, strict=True):
            scores.losses.append(float(loss.sum()))
            scores.weights.append(float(weight.sum()))
            scores.correct.append(int(hits.sum()))
            scores.targets.append(len(hits))
            scores.exact.append(bool(hits[example.prompt_length - len(example.tokens) :].all()))
    model.train(was)
    return scores


def compare(
    model: AdapterModel,
    held_out: Sequence[Example],
    trained: Sequence[Example],
    history: TrainingLog,
    curve: int,
) -> dict[str, Any]:
    """The record of an evaluation, JSON. `history` evaluated the first `curve` of `held_out`."""
    base, adapter = (score(model, held_out, adapted=adapted) for adapted in (False, True))
    labelled = [i for i, e in enumerate(held_out) if e.label is not None]
    sides = {"base": _summary(base, labelled), "adapter": _summary(adapter, labelled)}
    if answers := _label_tokens(held_out, trained):
        by_label = _by_label(model, [held_out[i] for i in labelled], answers)
        for side in sides:
            right = sum(line[side] for line in by_label)
            sides[side]["label_accuracy"] = right / sum(line["examples"] for line in by_label)
    else:
        by_label = []
    improvement, noise = _improvement(base, adapter)
    return sides | {
        "examples": len(held_out),
        "targets": sum(base.targets),
        "improvement": improvement,
        "noise": noise,
        "better": improvement > ONE_SIDED_95 * (noise or 0.0),
        "labels": by_label,
        "base_loss": math.fsum(base.losses[:curve]) / math.fsum(base.weights[:curve]),
        "curve": history.curve(),
        "best_step": history.best.step if history.best else history.step,
        "last_step": history.step,
        "overfitted": history.overfitted,
    }


def _summary(scores: EvalScores, labelled: Sequence[int]) -> dict[str, float]:
    figures = {
        "loss": scores.loss,
        "perplexity": math.exp(min(scores.loss, MAX_LOSS)),
        "token_accuracy": scores.accuracy,
    }
    if labelled:
        figures["exact_match"] = sum(scores.exact[i] for i in labelled) / len(labelled)
    return figures


def _improvement(base: EvalScores, adapter: EvalScores) -> tuple[float, float | None]:
    """By how much the adapter's loss is lower, and that figure's standard error over examples, if any."""
    gains = [b - a for b, a in zip(base.losses, adapter.losses, strict=True)]
    total, n = math.fsum(base.weights), len(gains)
    mean = math.fsum(gains) / total
    if n < 2:
        return mean, None
    spread = math.fsum((gain - mean * weight) ** 2 for gain, weight in zip(gains, base.weights, strict=True))
    return mean, math.sqrt(spread * n / (n - 1)) / total


def _label_tokens(held_out: Sequence[Example], trained: Sequence[Example]) -> dict[str, list[int]]:
    """The tokens of each label, if answers are labels: few different ones, of which each comes again."""
    counts: Counter[str] = Counter()
    answers: dict[str, list[int]] = {}
    for example in [*trained, *held_out]:
        if example.label is None:
            continue
        counts[example.label] += 1
        answers.setdefault(example.label, example.tokens[example.prompt_length :])
        if len(answers) > MAX_LABELS:
            return {}
    classes = len(answers) > 1 and counts.total() >= 3 * len(answers)
    return answers if classes and any(e.label is not None for e in held_out) else {}


def _by_label(
    model: AdapterModel, examples: Sequence[Example], answers: dict[str, list[int]]
) -> list[dict[str, Any]]:
    """How many examples of each label have it as their likeliest."""
    labels = sorted(answers)
    asked = first_examples(examples, LABEL_TOKENS / len(labels))
    tried = [_with_answer(example, answers[label]) for example in asked for label in labels]
    found: dict[str, Counter[str]] = {"base": Counter(), "adapter": Counter()}
    for side, right in found.items():
        losses = score(model, tried, adapted=side == "adapter").losses
        for i, example in enumerate(asked):
            own = losses[i * len(labels) : (i + 1) * len(labels)]
            right[str(example.label)] += labels[own.index(min(own))] == example.label
    totals = Counter(example.label for example in asked)
    return [
        {"label": label, "examples": totals[label]} | {side: right[label] for side, right in found.items()}
        for label in labels
        if totals[label]
    ]


def _with_answer(example: Example, answer: list[int]) -> Example:
    """The same question with this answer, which alone counts."""
    n = example.prompt_length
    return Example(example.tokens[:n] + answer, [0.0] * n + [1.0] * len(answer), n)
