"""Evaluation on held-out examples: the base and the adapted model side by side.

Nothing is generated. Greedy decoding gives an answer exactly if each of its tokens is the most likely after
those before it, which one forward pass shows.
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

PACK_TOKENS = 1024  # in one forward pass, unless an example is longer
MAX_LABELS = 16  # with more distinct answers the data is not a classification
LABEL_TOKENS = 30_000  # budget for finding the most likely label of examples
ONE_SIDED_95 = 1.645  # one-sided 95 % quantile of the normal distribution: chance exceeds it once in 20
MAX_LOSS = 80.0  # nats; keeps the perplexity finite


class EvalScores(msgspec.Struct, frozen=True):
    """Sums over the targets of each example."""

    losses: list[float]  # sum of weight * loss in nats
    weights: list[float]
    correct: list[int]  # targets that were the most likely token
    targets: list[int]
    exact: list[bool]  # whether all tokens of the last answer were

    @property
    def loss(self) -> float:
        """The mean over targets, by weight."""
        return math.fsum(self.losses) / math.fsum(self.weights)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / sum(self.targets)


@torch.no_grad()
def score(model: AdapterModel, examples: Sequence[Example], *, adapted: bool = True) -> EvalScores:
    """Evaluate the adapted model, or with `adapted=False` the base. No dropout, no random numbers."""
    was_training = model.training
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
    model.train(was_training)
    return scores


def compare(
    model: AdapterModel,
    held_out: Sequence[Example],
    trained: Sequence[Example],
    log: TrainingLog,
    during_training: int,
) -> dict[str, Any]:
    """The evaluation record of a job, as JSON objects.

    During training, `log` evaluated the first `during_training` examples of `held_out`.
    """
    base, adapter = (score(model, held_out, adapted=adapted) for adapted in (False, True))
    with_label = [i for i, e in enumerate(held_out) if e.label is not None]
    sides = {"base": _summary(base, with_label), "adapter": _summary(adapter, with_label)}
    if answers := _label_tokens(held_out, trained):
        by_label = _by_label(model, [held_out[i] for i in with_label], answers)
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
        "base_loss": math.fsum(base.losses[:during_training]) / math.fsum(base.weights[:during_training]),
        "curve": log.curve(),
        "best_step": log.best.step if log.best else log.step,
        "last_step": log.step,
        "overfitted": log.overfitted,
    }


def _summary(scores: EvalScores, with_label: Sequence[int]) -> dict[str, float]:
    """Metrics of one model; `with_label` are the indices of examples with a label."""
    summary = {
        "loss": scores.loss,
        "perplexity": math.exp(min(scores.loss, MAX_LOSS)),
        "token_accuracy": scores.accuracy,
    }
    if with_label:
        summary["exact_match"] = sum(scores.exact[i] for i in with_label) / len(with_label)
    return summary


def _improvement(base: EvalScores, adapter: EvalScores) -> tuple[float, float | None]:
    """By how much the adapter's mean loss is lower, and its standard error over examples, if n > 1."""
    gains = [b - a for b, a in zip(base.losses, adapter.losses, strict=True)]
    total, n = math.fsum(base.weights), len(gains)
    mean = math.fsum(gains) / total
    if n < 2:
        return mean, None
    spread = math.fsum((gain - mean * weight) ** 2 for gain, weight in zip(gains, base.weights, strict=True))
    return mean, math.sqrt(spread * n / (n - 1)) / total


def _label_tokens(held_out: Sequence[Example], trained: Sequence[Example]) -> dict[str, list[int]]:
    """Label -> its tokens, if the data is a classification: few distinct answers that repeat; else empty."""
    counts: Counter[str] = Counter()
    answers: dict[str, list[int]] = {}
    for example in [*trained, *held_out]:
        if example.label is None:
            continue
        counts[example.label] += 1
        answers.setdefault(example.label, example.tokens[example.prompt_length :])
        if len(answers) > MAX_LABELS:
            return {}
    is_classification = len(answers) > 1 and counts.total() >= 3 * len(answers)
    return answers if is_classification and any(e.label is not None for e in held_out) else {}


def _by_label(
    model: AdapterModel, examples: Sequence[Example], answers: dict[str, list[int]]
) -> list[dict[str, Any]]:
    """For each label, how many of its examples have it as the most likely label."""
    labels = sorted(answers)
    chosen = first_examples(examples, LABEL_TOKENS / len(labels))
    candidates = [_with_answer(example, answers[label]) for example in chosen for label in labels]
    correct: dict[str, Counter[str]] = {"base": Counter(), "adapter": Counter()}
    for side, counts in correct.items():
        losses = score(model, candidates, adapted=side == "adapter").losses
        for i, example in enumerate(chosen):
            label_losses = losses[i * len(labels) : (i + 1) * len(labels)]
            best = labels[label_losses.index(min(label_losses))]
            counts[str(example.label)] += best == example.label
    totals = Counter(example.label for example in chosen)
    return [
        {"label": label, "examples": totals[label]}
        | {side: counts[label] for side, counts in correct.items()}
        for label in labels
        if totals[label]
    ]


def _with_answer(example: Example, answer: list[int]) -> Example:
    """The example's prompt with another answer, whose tokens are the only targets."""
    n = example.prompt_length
    return Example(example.tokens[:n] + answer, [0.0] * n + [1.0] * len(answer), n)
