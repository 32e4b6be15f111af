import pytest

from server.finetune.data.batching import (
    FINAL_TOKENS,
    MAX_EVALUATION_TOKENS,
    MAX_EVALUATIONS,
    MIN_EVALUATION_TOKENS,
    LengthGroupedBatches,
    first_examples,
    packed_examples,
    plan_evaluation,
)
from server.finetune.data.examples import Example
from tests.server.finetune.small_trainings import examples, recipe

LENGTHS = [len(e.tokens) for e in examples(101)]


@pytest.mark.parametrize("size", [1, 2, 7, 101, 200])
def test_every_example_is_in_one_batch_of_an_epoch_and_all_batches_but_one_are_full(size: int) -> None:
    batches = LengthGroupedBatches(LENGTHS, size, seed=3)
    drawn = list(batches)
    assert len(drawn) == len(batches)
    assert sorted(i for batch in drawn for i in batch) == list(range(101))
    assert sum(len(batch) < size for batch in drawn) <= 1


def test_an_epoch_has_an_order_of_its_own_which_seed_and_number_give() -> None:
    batches = LengthGroupedBatches(LENGTHS, 4, seed=3)
    first = list(batches)
    assert list(batches) == first
    batches.epoch = 1
    assert list(batches) != first
    assert list(LengthGroupedBatches(LENGTHS, 4, seed=4)) != first


def test_examples_of_a_batch_are_of_like_length() -> None:
    def spread(drawn: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in drawn)

    anyhow = [list(range(at, min(at + 4, 101))) for at in range(0, 101, 4)]
    assert spread(list(LengthGroupedBatches(LENGTHS, 4, seed=3))) < spread(anyhow) / 4


def test_packs_keep_the_order_and_the_size() -> None:
    some = examples(30)
    found = list(packed_examples(some, 25))
    assert [e for pack in found for e in pack] == some
    assert all(sum(len(e.tokens) for e in pack) <= 25 for pack in found)
    long = Example([1] * 40, [1.0] * 40)
    assert list(packed_examples([some[0], long, some[1]], 25)) == [[some[0]], [long], [some[1]]]
    assert list(packed_examples([], 25)) == []


def test_within_takes_one_at_least() -> None:
    some = examples(3)
    assert first_examples(some, 0) == some[:1]
    assert first_examples(some, 1e9) == some
    assert first_examples([], 5) == []


def test_a_training_is_evaluated_a_few_times_and_always_at_its_end() -> None:
    for epochs, size, count in ((1, 1, 6), (5, 1, 10), (50, 1, MAX_EVALUATIONS), (1, 8, 5)):
        own = recipe(n_epochs=epochs, batch_size=size)
        made = plan_evaluation(own, examples(40), examples(4))
        assert len(made.steps) == count
        assert max(made.steps) == own.steps(40)
        assert min(made.steps) >= 1


def test_evaluations_are_on_all_that_is_held_out_or_on_a_random_part_of_it() -> None:
    some = examples(20)
    made = plan_evaluation(recipe(), examples(40), some)
    assert {id(e) for e in made.examples} == {id(e) for e in some} == {id(e) for e in made.final}
    many = examples(8000)
    made = plan_evaluation(recipe(), examples(40), many)
    tokens = [sum(len(e.tokens) for e in part) for part in (made.examples, made.final)]
    assert tokens[0] <= MIN_EVALUATION_TOKENS
    assert tokens[1] <= FINAL_TOKENS
    assert made.examples == made.final[: len(made.examples)] != many[: len(made.examples)]
    tokens_then = sum(len(e.tokens) for e in plan_evaluation(recipe(n_epochs=50), many, many).examples)
    assert MAX_EVALUATION_TOKENS * 0.9 < tokens_then <= MAX_EVALUATION_TOKENS


def test_nothing_held_out_is_never_evaluated() -> None:
    made = plan_evaluation(recipe(), examples(40), [])
    assert (made.steps, made.examples, made.final) == (frozenset(), [], [])
