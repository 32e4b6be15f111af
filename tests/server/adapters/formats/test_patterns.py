import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.adapters.formats.patterns import MAX_KEY, MAX_WILD, Pattern, Patterns
from server.errors import InvalidAdapter
from tests.fixtures.cost import processor_seconds

ATOMS = ["q", "_proj", "-", ".", "\\.", ".*", ".+", "\\d", "\\d+", "[0-9]", "[0-9]+", "1", "layers", "model"]
keys = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "", "^"]),
    st.lists(st.sampled_from(ATOMS), min_size=1, max_size=6).map("".join),
    st.sampled_from(["", "", "$"]),
)
modules = st.lists(st.sampled_from(["q", "_proj", ".", "1", "12", "layers", "model", "-"]), max_size=8).map(
    "".join
)


@given(keys, modules)
@example(".*", "")
@example(".*", "q.")
def test_a_key_matches_what_pefts_expression_matches(key: str, module: str) -> None:
    expected = re.match(rf"(.*\.)?({key})$", module) is not None
    assert Pattern(key, "alpha_pattern").matches(module) is expected


def test_the_first_matching_key_wins_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    pattern = {"layers.1.q": 1.0, "q": 2.0, ".*v": 3.0, "^model.k": 4.0}
    names = ["layers.1.q", "layers.2.q", "model.xv", "model.k", "a.model.k", "kq", "q"]
    patterns = Patterns(list(pattern.items()), "alpha_pattern")
    assert [patterns.value(n, 0.0) for n in names] == [
        pattern.get(get_pattern_key(pattern, n), 0.0) for n in names
    ]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "q|v",
        "(q)",
        "q*",
        "q+",
        "a{2}",
        "\\w",
        "[a-z]",
        "q?",
        "a^",
        "$a",
        "\\",
        "q\\$",
        "é",
        "*",
        "+",
        "(a+)+$",
        "\\d*",
        "\n",
        "q" * (MAX_KEY + 1),
    ],
)
def test_everything_else_is_refused_by_name(key: str) -> None:
    with pytest.raises(InvalidAdapter, match="rank_pattern") as caught:
        Pattern(key, "rank_pattern")
    assert caught.value.param == "rank_pattern"


def test_the_worst_keys_cost_milliseconds() -> None:
    patterns = Patterns([(".*a" * (MAX_KEY // 3), 1.0)] * MAX_WILD + [("." * 60, 1.0)] * 900, "rank_pattern")
    with processor_seconds(5):
        for _ in range(200):
            patterns.value("a" * 60 + "b", 0.0)


def test_too_many_keys_are_refused() -> None:
    for pairs in ([("q", 1.0)] * 1025, [(".*", 1.0)] * (MAX_WILD + 1)):
        with pytest.raises(InvalidAdapter, match="may have"):
            Patterns(pairs, "rank_pattern")
