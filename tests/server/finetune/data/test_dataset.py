"""A whole file: what is counted, what is complained of, where reading stops, and what is held out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import InvalidField
from server.finetune.data.dataset import (
    DEFAULT_LIMITS,
    DatasetLimits,
    Example,
    Problem,
    Report,
    check,
    load,
    refusal,
    split,
)
from tests.server.api.generation.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CHAT = {"messages": [USER, ASSISTANT]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(*lines: Any) -> Path:
        path = tmp_path / "data.jsonl"
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(raw))
        return path

    return to_file


def test_a_sound_file_is_counted(write: Callable[..., Path]) -> None:
    path = write(CHAT, b"", {"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]}, b"  \r")
    # <|user|> h i->"hi" is two bytes, <|end|>, <|assistant|>, hello, <|end|>
    first, second = load(path, TOKENIZER, 64)
    assert len(first.tokens) == 1 + 2 + 1 + 1 + 1 + 1
    assert sum(first.weights) == sum(second.weights) == 2
    assert check(path, TOKENIZER, 64) == Report(
        shape="messages", examples=2, tokens=7 + 14, trained_tokens=4, max_length=14
    )


def test_windows_files_and_byte_order_marks_read_as_others_do(write: Callable[..., Path]) -> None:
    plain = load(write({"text": "hello"}, {"text": "wo"}), TOKENIZER, 64)
    dos = write(b'\xef\xbb\xbf{"text": "hello"}\r', b'{"text": "wo"}\r\n')
    assert load(dos, TOKENIZER, 64) == plain


def test_truncated_and_dropped_examples_are_counted(write: Callable[..., Path]) -> None:
    path = write({"prompt": "abc", "completion": "de"}, {"prompt": "a", "completion": "b"})
    report = check(path, TOKENIZER, 4)
    assert (report.examples, report.truncated, report.dropped, report.max_length) == (2, 1, 0, 6)
    assert report.tokens == 4 + 3
    report = check(path, TOKENIZER, 1)
    assert (report.examples, report.dropped) == (0, 2)
    assert report.problems == [Problem(1, "", "No example has a target left within 1 tokens.")]


def test_every_bad_line_is_named_and_the_sound_ones_counted(write: Callable[..., Path]) -> None:
    path = write(
        CHAT,
        b"nope",
        {"messages": [USER]},
        {"text": "hello"},
        {"messages": [ASSISTANT | {"role": "robot"}, USER]},
        b'{"messages": NaN}',
        CHAT,
    )
    report = check(path, TOKENIZER, 64)
    assert (report.shape, report.examples, report.total_problems) == ("messages", 2, 5)
    assert [(problem.line, problem.field) for problem in report.problems] == [
        (2, ""),
        (3, "messages"),
        (4, ""),
        (5, "messages[0].role"),
        (6, ""),
    ]
    assert report.problems[2].reason == "The line is text, and line 1 is messages; a file has one shape."
    refused = refusal(report, "validation_file")
    assert refused is not None
    assert refused.param == "validation_file"
    first, *lines = refused.message.splitlines()
    assert first == "validation_file cannot be trained on."
    assert [line.partition(":")[0] for line in lines] == [f"Line {number}" for number in (2, 3, 4, 5, 6)]
    assert lines[3].startswith("Line 5: messages[0].role must be one of")
    with pytest.raises(InvalidField, match="training_file has a problem in line 2: The line is not JSON"):
        load(path, TOKENIZER, 64)


def test_a_line_that_is_wrong_otherwise_still_sets_the_shape(write: Callable[..., Path]) -> None:
    report = check(write({"messages": []}, {"text": "a"}), TOKENIZER, 64)
    assert [problem.field for problem in report.problems] == ["messages", ""]


def test_no_more_problems_are_listed_than_the_limit_says(write: Callable[..., Path]) -> None:
    report = check(write(*[b"{}"] * 60), TOKENIZER, 64)
    assert (len(report.problems), report.total_problems) == (50, 60)
    refused = refusal(report)
    assert refused is not None
    assert "Line 50: The line has neither" in refused.message
    assert refused.message.endswith("\nAnd 10 more.")


@pytest.mark.parametrize("data", [b"", b"\n\n  \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_a_problem(write: Callable[..., Path], data: bytes) -> None:
    assert check(write(data), TOKENIZER, 64).problems == [Problem(1, "", "The file is empty.")]
    assert refusal(check(write(CHAT), TOKENIZER, 64)) is None


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (DatasetLimits(file_bytes=10), "training_file must have at most 10 bytes, not"),
        (DatasetLimits(examples=2), "training_file must have at most 2 examples, not 3."),
        (DatasetLimits(tokens=20), "training_file must have at most 20 tokens, not 21."),
        (DatasetLimits(seconds=-1), "training_file takes more than -1 s to read."),
    ],
)
def test_a_file_over_a_limit_is_refused_at_once(
    write: Callable[..., Path], limits: DatasetLimits, reason: str
) -> None:
    path = write(CHAT, CHAT, CHAT)
    for read in (check, load):
        with pytest.raises(InvalidField, match=reason):
            read(path, TOKENIZER, 64, limits)


def test_lines_and_messages_over_a_limit_are_problems(write: Callable[..., Path]) -> None:
    limits = DatasetLimits(line_bytes=150, messages=2)
    path = write(CHAT, {"text": "x" * 150}, {"messages": [USER] * 3}, CHAT)
    assert [problem.reason for problem in check(path, TOKENIZER, 64, limits).problems] == [
        "The line is longer than 150 bytes.",
        "messages must have at most 2 messages, not 3.",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROLE = st.sampled_from(["system", "developer", "user", "assistant", "tool", "robot", 1, None])
CONTENT = (
    st.text(max_size=8) | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()})) | JSON
)
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE, "content": CONTENT},
    optional={"weight": st.sampled_from([0, 1, 2, 1.0, True]) | JSON, "name": JSON, "tool_calls": JSON},
)
MESSAGES = st.lists(MESSAGE | JSON, max_size=4) | st.builds(
    lambda asked, said: [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
    st.text(max_size=8),
    st.text(max_size=8),
)
LINE = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES,
        "prompt": st.text(max_size=8) | MESSAGES,
        "completion": st.text(max_size=8) | MESSAGES,
        "text": st.text(max_size=8) | JSON,
        "extra": JSON,
    },
)


def judged(path: Path, data: bytes, max_tokens: int, limits: DatasetLimits = DEFAULT_LIMITS) -> None:
    path.write_bytes(data)
    try:
        report = check(path, TOKENIZER, max_tokens, limits)
    except InvalidField:
        return
    assert len(report.problems) == min(report.total_problems, limits.problems)
    assert all(problem.line >= 1 and problem.reason.endswith(".") for problem in report.problems)
    json.dumps([problem.reason + problem.field for problem in report.problems]).encode()
    if report.problems:
        assert refusal(report) is not None
        return
    examples = load(path, TOKENIZER, max_tokens, limits)
    assert len(examples) == report.examples > 0
    assert sum(len(example.tokens) for example in examples) == report.tokens
    assert sum(map(any, (example.weights for example in examples))) == report.examples
    for example in examples:
        assert len(example.tokens) == len(example.weights) <= max_tokens
        assert not example.weights[0]


@settings(deadline=None)
@given(data=st.binary(max_size=200), max_tokens=st.integers(1, 20))
def test_any_bytes_end_in_a_report_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, max_tokens: int
) -> None:
    judged(tmp_path_factory.getbasetemp() / "any.jsonl", data, max_tokens)


@settings(deadline=None, max_examples=300)
@given(
    lines=st.lists(LINE | JSON, max_size=4),
    max_tokens=st.integers(1, 40),
    cut=st.integers(0, 30),
    escaped=st.booleans(),
    limits=st.builds(
        DatasetLimits, line_bytes=st.integers(1, 300), problems=st.integers(1, 3), messages=st.just(3)
    ),
)
def test_any_lines_end_in_a_report_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[Any],
    max_tokens: int,
    cut: int,
    escaped: bool,
    limits: DatasetLimits,
) -> None:
    """Sound ones, nearly sound ones, and all of them cut off somewhere."""
    text = "\n".join(json.dumps(line, ensure_ascii=escaped) for line in lines)
    data = text.encode(errors="surrogatepass")
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    judged(path, data, max_tokens)
    judged(path, data[: len(data) - cut], max_tokens, limits)


@pytest.mark.parametrize("depth", range(850, 1000, 3))
def test_nesting_that_exhausts_the_stack_is_a_problem(write: Callable[..., Path], depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    path = write(b'{"messages": [{"role": "user", "content": ' + deep + b"}]}", b'{"text": ' + deep + b"}")
    assert check(path, TOKENIZER, 64).total_problems == 2


def example(*tokens: int) -> Example:
    return Example(list(tokens), [0.0] + [1.0] * (len(tokens) - 1))


@given(
    tokens=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=30),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_a_split_is_disjoint_whole_and_never_parts_what_is_the_same(
    tokens: list[list[int]], share: float, seed: int
) -> None:
    examples = [Example(ids, [0.0] * len(ids), prompt_length=at) for at, ids in enumerate(tokens)]
    train, held_out = split(examples, share, seed)
    assert split(examples, share, seed) == (train, held_out)
    places = [[e.prompt_length for e in side] for side in (train, held_out)]
    assert sorted(places[0] + places[1]) == list(range(len(examples)))
    assert all(side == sorted(side) for side in places)
    different = {tuple(e.tokens) for e in examples}
    kept = {tuple(e.tokens) for e in train}
    assert not kept & {tuple(e.tokens) for e in held_out}
    assert bool(kept) == bool(examples)
    assert bool(held_out) == (share > 0 and len(different) > 1)


def test_a_split_has_the_share_that_was_asked_for_and_another_seed_another_one() -> None:
    examples = [example(n, n + 1) for n in range(200)]
    sides = [split(examples, 0.1, seed) for seed in range(3)]
    assert [len(held_out) for _, held_out in sides] == [20, 20, 20]
    assert sides[0] != sides[1] != sides[2]


def test_the_order_of_lines_moves_no_example_to_the_other_side() -> None:
    examples = [example(n, n + 1) for n in range(50)]
    _, held_out = split(examples, 0.2, 7)
    _, of_reversed = split(examples[::-1], 0.2, 7)
    assert held_out == of_reversed[::-1]


def test_where_all_groups_are_larger_than_the_share_the_smallest_is_held_out() -> None:
    examples = [example(1, 2)] * 10 + [example(2, 3)] * 8
    train, held_out = split(examples, 0.1, 0)
    assert (train, held_out) == (examples[:10], examples[10:])
    assert split(examples[:10], 0.5, 0) == (examples[:10], [])
