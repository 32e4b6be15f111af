"""Training files as examples. No torch.

`check` reports the problems of a file line by line, `load` reads a valid one, `split` holds some of its
examples out. Any bytes result in a report or in InvalidField, in bounded memory and time.
"""

import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import msgspec

from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidField
from server.finetune.data.examples import Example, example_of, truncated
from server.finetune.data.jsonl import LineError, parse_line, read_lines
from server.finetune.data.record_kinds import RecordKind, read_record, record_kind

__all__ = ["DatasetLimits", "Example", "Problem", "RecordKind", "Report", "check", "load", "refusal", "split"]


class DatasetLimits(msgspec.Struct, frozen=True):
    """Limits of a file; `seconds` is the longest time that reading it may take."""

    file_bytes: int = 64 << 20
    line_bytes: int = 1 << 20
    examples: int = 100_000
    messages: int = 128  # of an example
    tokens: int = 20_000_000
    problems: int = 50  # in a report
    seconds: float = 120.0


DEFAULT_LIMITS = DatasetLimits()


class Problem(msgspec.Struct, frozen=True):
    """A problem of one line. `field` is a path such as "messages[2].role", or "" for the whole line."""

    line: int
    field: str
    reason: str


class Report(msgspec.Struct):
    """The content of a file. With any problem the file is unfit; the counts are those of valid lines."""

    shape: RecordKind | None = None  # None: of no line
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0  # examples cut to max_tokens
    dropped: int = 0  # examples without a target after that
    max_length: int = 0  # tokens of the longest example before the cut
    problems: list[Problem] = []  # the first ones
    total_problems: int = 0


class _Line(NamedTuple):
    """A line as it was read: an example, an error, or neither if no target was left."""

    number: int
    shape: RecordKind | None = None
    length: int = 0  # tokens of the whole example
    example: Example | None = None  # cut to max_tokens
    fault: LineError | None = None


def check(
    path: Path,
    tokenizer: Tokenizer,
    max_tokens: int,
    limits: DatasetLimits = DEFAULT_LIMITS,
    *,
    param: str = "training_file",
) -> Report:
    """Report on the whole file. Raises InvalidField if it exceeds `limits`."""
    report = Report()
    for line in _lines(path, tokenizer, max_tokens, limits, param):
        report.shape = report.shape or line.shape
        if line.fault:
            _add_problem(report, limits, Problem(line.number, line.fault.field, line.fault.reason))
            continue
        report.max_length = max(report.max_length, line.length)
        if line.example is None:
            report.dropped += 1
            continue
        report.examples += 1
        report.tokens += len(line.example.tokens)
        report.trained_tokens += sum(map(bool, line.example.weights))
        report.truncated += line.length > len(line.example.tokens)
    if not report.examples and not report.problems:
        why = (
            f"No example has a target left within {max_tokens} tokens."
            if report.dropped
            else "The file is empty."
        )
        _add_problem(report, limits, Problem(1, "", why))
    return report


def load(
    path: Path,
    tokenizer: Tokenizer,
    max_tokens: int,
    limits: DatasetLimits = DEFAULT_LIMITS,
    *,
    param: str = "training_file",
) -> list[Example]:
    """The examples of a file that `check` has found valid. Raises InvalidField at the first problem."""
    examples = []
    for line in _lines(path, tokenizer, max_tokens, limits, param):
        if line.fault:
            raise InvalidField(
                f"{param} has a problem in line {line.number}: {line.fault.reason}", param=param
            )
        if line.example:
            examples.append(line.example)
    return examples


def refusal(report: Report, param: str = "training_file") -> InvalidField | None:
    """The report's problems as one error, each on its own line; None if there are none."""
    if not report.problems:
        return None
    listed = "".join(f"\nLine {problem.line}: {problem.reason}" for problem in report.problems)
    more = report.total_problems - len(report.problems)
    rest = f"\nAnd {more} more." if more else ""
    return InvalidField(f"{param} cannot be trained on.{listed}{rest}", param=param)


def _lines(
    path: Path, tokenizer: Tokenizer, max_tokens: int, limits: DatasetLimits, param: str
) -> Iterator[_Line]:
    """All lines that are not blank. Raises InvalidField if the file exceeds `limits`."""
    deadline = time.monotonic() + limits.seconds
    first: _Line | None = None  # the line whose kind all others must have
    lines = tokens = 0
    _at_most(param, "bytes", path.stat().st_size, limits.file_bytes)
    for number, raw in read_lines(path, limits.line_bytes):
        if time.monotonic() > deadline:
            raise InvalidField(f"{param} takes more than {limits.seconds:g} s to read.", param=param)
        if raw is not None and not raw.strip():
            continue
        lines += 1
        _at_most(param, "examples", lines, limits.examples)
        line = _line(number, raw, tokenizer, max_tokens, limits, first)
        first = first or (line if line.shape else None)
        tokens += len(line.example.tokens) if line.example else 0
        _at_most(param, "tokens", tokens, limits.tokens)
        yield line


def _line(
    number: int,
    raw: bytes | None,
    tokenizer: Tokenizer,
    max_tokens: int,
    limits: DatasetLimits,
    first: _Line | None,
) -> _Line:
    shape: RecordKind | None = None
    try:
        if raw is None:
            raise LineError("", f"The line is longer than {limits.line_bytes} bytes.")
        fields = parse_line(raw)
        shape = record_kind(fields)
        if first and first.shape != shape:
            raise LineError(
                "", f"The line is {shape}, and line {first.number} is {first.shape}; a file has one shape."
            )
        example = example_of(read_record(shape, fields, limits.messages), tokenizer)
    except LineError as fault:
        return _Line(number, shape, fault=fault)
    return _Line(number, shape, len(example.tokens), truncated(example, max_tokens, tokenizer.lead))


def _at_most(param: str, what: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidField(f"{param} must have at most {limit} {what}, not {value}.", param=param)


def _add_problem(report: Report, limits: DatasetLimits, problem: Problem) -> None:
    report.total_problems += 1
    if len(report.problems) < limits.problems:
        report.problems.append(problem)


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out), both in the given order. The draw depends on the seed and the tokens alone.

    Examples with the same tokens stay together. About `share` of all is held out: at least one example if
    `share` is above 0 and two examples differ, and never all.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(tuple(example.tokens), []).append(index)
    drawn = [groups[tokens] for tokens in sorted(groups, key=lambda tokens: _draw(seed, tokens))]
    held_out: set[int] = set()
    count = 0
    if share > 0 and len(groups) > 1:
        count = min(max(1, round(share * len(examples))), len(examples) - 1)
    for group in drawn:
        if len(held_out) + len(group) <= count:
            held_out.update(group)
    if count and not held_out:  # every group is larger than the share
        smallest = min(drawn, key=len)
        held_out.update(smallest)
    return (
        [example for index, example in enumerate(examples) if index not in held_out],
        [example for index, example in enumerate(examples) if index in held_out],
    )


def _draw(seed: int, tokens: tuple[int, ...]) -> bytes:
    """A random number for a sequence, the same in every file and line."""
    return sha256(repr((seed, tokens)).encode()).digest()
