import hypothesis.strategies as st
import pytest
from hypothesis import given

from adapters_store.alias_target import check_weights, from_text, heaviest, pick, to_text
from server.errors import InvalidField

USERS = [f"user-{i}" for i in range(20_000)]
weights = st.dictionaries(st.integers(1, 99_999_999), st.floats(1e-12, 1000), min_size=2, max_size=10)


@given(weights | st.integers(1, 99_999_999))
def test_text_says_exactly_what_it_was_made_of(points: dict[int, float] | int) -> None:
    assert from_text(to_text(points)) == points


def test_each_version_gets_its_share() -> None:
    points = {3: 0.9, 4: 0.1}
    picked = [pick(points, user) for user in USERS]
    assert abs(picked.count(4) / len(USERS) - 0.1) < 0.01
    assert picked == [pick({3: 9.0, 4: 1.0}, user) for user in USERS], "weights are relative"


def test_moving_weights_moves_only_who_has_to() -> None:
    """Of three versions, so that a cumulative hash would fail: v5 grows at v3's cost, v4's users stay."""
    before, after = {3: 0.6, 4: 0.3, 5: 0.1}, {3: 0.4, 4: 0.3, 5: 0.3}
    moves = [(pick(before, user), pick(after, user)) for user in USERS]
    moved = [move for move in moves if move[0] != move[1]]
    assert {old for old, _ in moved} <= {3, 4}
    assert {new for _, new in moved} <= {4, 5}
    assert 0.2 <= len(moved) / len(USERS) < 0.27, "0.2 must move"
    gone = [(pick(before, user), pick({3: 0.6, 4: 0.3}, user)) for user in USERS]
    assert all(old == new for old, new in gone if old != 5), "a version that goes moves its own users only"


def test_the_heaviest_stands_for_all() -> None:
    assert [heaviest(points) for points in (7, {3: 0.9, 4: 0.1}, {3: 0.5, 4: 0.5})] == [7, 3, 4]


def test_weights_come_by_number() -> None:
    assert check_weights({"v3": 9, "4": 1}) == {3: 9.0, 4: 1.0}
    assert check_weights({"3": 0.2}) == 3


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({}, "1 to 10"),
        ({str(i): 1.0 for i in range(1, 12)}, "not 11"),
        ({"3": 0.5, "v3": 0.5}, "twice"),
        ({"prod": 0.5, "3": 0.5}, "'prod'"),
        ({"0": 0.5, "3": 0.5}, "'0'"),
        ({"3": 0.0, "4": 1.0}, "over 0"),
        ({"3": -1.0, "4": 1.0}, "-1.0"),
        ({"3": float("nan"), "4": 1.0}, "nan"),
        ({"3": float("inf"), "4": 1.0}, "inf"),
        ({"3": 1001.0, "4": 1.0}, "1000"),
    ],
)
def test_bad_weights_are_refused_in_a_sentence(given_: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidField, match=said) as caught:
        check_weights(given_)
    assert caught.value.param == "weights"
