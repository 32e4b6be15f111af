"""Batches of examples of similar length, and the plan of evaluations. No torch: only lengths and a seed."""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from server.finetune.data.examples import Example
from server.finetune.recipe import Recipe

POOL_BATCHES = 32  # the number of batches within which examples are sorted by length
EVALUATIONS_PER_EPOCH = 2
MIN_EVALUATIONS, MAX_EVALUATIONS = 6, 20  # of a whole training
EVALUATION_SHARE = 0.5  # evaluated tokens per trained token; a forward pass costs about 1/3 of a step
MIN_EVALUATION_TOKENS, MAX_EVALUATION_TOKENS = 2_000, 20_000  # of one evaluation during training
FINAL_TOKENS = 50_000  # of the examples on which base and adapter are compared at the end

T = TypeVar("T")


class LengthGroupedBatches:
    """Batches of indices, in a new order for each epoch; all but one are full.

    The examples of a batch have similar lengths, so that batches of as many tokens take similar time and
    memory.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed} {self.epoch}")  # noqa: S311 - no secret
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        pool = POOL_BATCHES * self.size
        for start in range(0, len(order), pool):
            order[start : start + pool] = sorted(order[start : start + pool], key=lambda i: self.lengths[i])
        batches = [order[start : start + self.size] for start in range(0, len(order), self.size)]
        rng.shuffle(batches)
        return iter(batches)


class EvaluationPlan(msgspec.Struct, frozen=True):
    """The steps after which to evaluate, and a random sample of the held-out examples to evaluate on."""

    steps: frozenset[int]
    examples: list[Example]  # during training; the first ones of `final`
    final: list[Example]  # after training


def plan_evaluation(
    recipe: Recipe, examples: Sequence[Example], held_out: Sequence[Example]
) -> EvaluationPlan:
    """Evenly spaced evaluations, whose cost is bounded by EVALUATION_SHARE and MAX_EVALUATION_TOKENS."""
    total = recipe.steps(len(examples))
    count = min(total, MAX_EVALUATIONS, max(MIN_EVALUATIONS, EVALUATIONS_PER_EPOCH * recipe.n_epochs))
    steps = {round(total * (i + 1) / count) for i in range(count)}
    trained = recipe.n_epochs * sum(len(e.tokens) for e in examples)
    drawn = random.Random(recipe.seed).sample(held_out, len(held_out))  # noqa: S311 - no secret
    tokens = min(max(EVALUATION_SHARE * trained / count, MIN_EVALUATION_TOKENS), MAX_EVALUATION_TOKENS)
    sample = first_examples(drawn, tokens)
    return EvaluationPlan(frozenset(steps if sample else ()), sample, first_examples(drawn, FINAL_TOKENS))


def first_examples(examples: Sequence[Example], tokens: float) -> list[Example]:
    """The first examples with at most `tokens` tokens together; at least one, if there is any."""
    kept: list[Example] = []
    for example in examples:
        tokens -= len(example.tokens)
        if kept and tokens < 0:
            break
        kept.append(example)
    return kept


def packed_examples(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Groups of consecutive examples with at most `tokens` tokens together, or a single longer one."""
    pack: list[Example] = []
    size = 0
    for example in examples:
        if pack and size + len(example.tokens) > tokens:
            yield pack
            pack, size = [], 0
        pack.append(example)
        size += len(example.tokens)
    if pack:
        yield pack
