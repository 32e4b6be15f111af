import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.adapters.formats.module_patterns import MAX_DEPTH, MAX_KEY, MAX_WILD, Pattern, Patterns
from server.errors import InvalidAdapter
from tests.fixtures.cost import processor_seconds

ATOMS = ["q", "_proj", "-", ".", "\\.", ".*", ".+", "\\d", "\\d+", "[0-9]", "[0-9]+", "1", "layers", "model"]
CLASSES = ["[qk]", "[0-2]", "[_a-q1]"]
sequences = st.lists(st.sampled_from(ATOMS + CLASSES), min_size=1, max_size=6).map("".join)
choices = st.recursive(
    sequences,
    lambda inner: st.builds(
        "{}({}{}){}".format,
        sequences,
        st.sampled_from(["", "?:"]),
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.one_of(st.just(""), sequences),
    ),
    max_leaves=6,
)
keys = st.builds(
    "{}{}{}".format, st.sampled_from(["", "", "^"]), choices, st.sampled_from(["", "", "$", "|q", "|^model$"])
)
modules = st.lists(st.sampled_from(["q", "_proj", ".", "1", "12", "layers", "model", "-"]), max_size=8).map(
    "".join
)


@given(keys, modules)
@example(".*", "")
@example(".*", "q.")
@example("^q|1$", "model.1")
@example("(^q|1)_proj", "model.q_proj")
@example("layers.(1|12).(?:q|k)_proj", "model.layers.12.q_proj")
@example("()|q", "model.")
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
        "(q",
        "q)",
        "(q)+",
        "(.|q)*",
        "(q)?",
        ".(*)",
        ".|*",
        "(?=q)",
        "(?P<x>q)",
        "a(b^)",
        "($a|b)c",
        "q*",
        "q+",
        "a{2}",
        "\\w",
        "[^a]",
        "[]",
        "[a",
        "[z-a]",
        "[a-]",
        "[.]",
        "[q(k])",
        "[0-9]*",
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
        "(" * (MAX_DEPTH + 1) + "q" + ")" * (MAX_DEPTH + 1),
        "(q|k)" * 9,  # 512 alternatives
    ],
)
def test_everything_else_is_refused_by_name(key: str) -> None:
    with pytest.raises(InvalidAdapter, match="rank_pattern") as caught:
        Pattern(key, "rank_pattern")
    assert caught.value.param == "rank_pattern"


def test_the_worst_keys_cost_milliseconds() -> None:
    with processor_seconds(10):
        for key in ("(a|b)" * 8 + "." * 200, "(a|b)" * 8 + ".*" * 100, "|" * (MAX_KEY - 1), "(a|" * 80):
            with pytest.raises(InvalidAdapter):
                Patterns([(key, 1.0)] * 1000, "rank_pattern")
        patterns = Patterns(
            [(".*a" * (MAX_KEY // 3), 1.0)] * MAX_WILD + [("." * 60, 1.0)] * 900, "rank_pattern"
        )
        for _ in range(200):
            patterns.value("a" * 60 + "b", 0.0)


def test_too_many_keys_are_refused() -> None:
    alternatives = [("(q|k)" * 8, 1.0)] * 4
    Patterns(alternatives, "rank_pattern")
    for pairs in ([("q", 1.0)] * 1025, [(".*", 1.0)] * (MAX_WILD + 1), [*alternatives, ("q", 1.0)]):
        with pytest.raises(InvalidAdapter, match="may have"):
            Patterns(pairs, "rank_pattern")
