"""Which examples train together, and when held-out ones are asked. No torch: only lengths and a seed."""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from server.finetune.data.examples import Example
from server.finetune.recipe import Recipe

POOL_BATCHES = 32  # batches that examples of like length are sought among
EVALUATIONS_PER_EPOCH, MIN_EVALUATIONS, MAX_EVALUATIONS = (
    2,
    6,
    20,
)  # evaluations: of an epoch, of a whole training
EVALUATION_SHARE = 0.5  # of the tokens trained on: a forward pass alone costs about a third
MIN_EVALUATION_TOKENS, MAX_EVALUATION_TOKENS = 2_000, 20_000  # of one evaluation while training
FINAL_TOKENS = 50_000  # of those that base and adapter are compared on at the end

T = TypeVar("T")


class LengthGroupedBatches:
    """Batches of indices, in an order of each epoch's own; all but one are full.

    A batch holds examples of like length, so that steps take equally long and none needs far more memory
    than the others with as many tokens.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed} {self.epoch}")  # noqa: S311 - an order
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        pool = POOL_BATCHES * self.size
        for at in range(0, len(order), pool):
            order[at : at + pool] = sorted(order[at : at + pool], key=lambda i: self.lengths[i])
        batches = [order[at : at + self.size] for at in range(0, len(order), self.size)]
        rng.shuffle(batches)
        return iter(batches)


class EvaluationPlan(msgspec.Struct, frozen=True):
    """When to evaluate, and on what: a random draw of what is held out, or all if that costs little."""

    steps: frozenset[int]
    examples: list[Example]  # while training; the first of `final`
    final: list[Example]  # once it is over


def plan_evaluation(
    recipe: Recipe, examples: Sequence[Example], held_out: Sequence[Example]
) -> EvaluationPlan:
    total = recipe.steps(len(examples))
    count = min(total, MAX_EVALUATIONS, max(MIN_EVALUATIONS, EVALUATIONS_PER_EPOCH * recipe.n_epochs))
    steps = {round(total * (i + 1) / count) for i in range(count)}
    trained = recipe.n_epochs * sum(len(e.tokens) for e in examples)
    drawn = random.Random(recipe.seed).sample(held_out, len(held_out))  # noqa: S311 - an order
    tokens = min(max(EVALUATION_SHARE * trained / count, MIN_EVALUATION_TOKENS), MAX_EVALUATION_TOKENS)
    some = first_examples(drawn, tokens)
    return EvaluationPlan(frozenset(steps if some else ()), some, first_examples(drawn, FINAL_TOKENS))


def first_examples(examples: Sequence[Example], tokens: float) -> list[Example]:
    """The first ones, as many as have so many tokens together, but one if there is any."""
    kept: list[Example] = []
    for example in examples:
        tokens -= len(example.tokens)
        if kept and tokens < 0:
            break
        kept.append(example)
    return kept


def packed_examples(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """In order, as many at once as have so many tokens together, or one that is longer."""
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
