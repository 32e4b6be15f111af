"""A tenant's training file as examples: token ids, and the weight of each as a target. No torch here.

`check` says what is wrong with a file, line by line; `load` reads one that is right; `split` holds a share of
its examples out.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Literal

import msgspec

Shape = Literal["messages", "prompt_completion", "text"]


class Example(msgspec.Struct, frozen=True):
    """One sequence. `weights[i]` is the weight of predicting `tokens[i]`; 0: context only. The first is 0."""

    tokens: list[int]
    weights: list[float]
    prompt_length: int = 0  # tokens before the last answer; 0: no question that could be asked again
    label: str | None = None  # the last answer, stripped, if it is one short line


class Problem(msgspec.Struct, frozen=True):
    """What is wrong with one line. `field` is a path such as "messages[2].role", or "" for the whole line."""

    line: int
    field: str
    reason: str


class Report(msgspec.Struct, frozen=True):
    """What is in a file. With any problem the file is unfit, and the counts are of its sound lines."""

    shape: Shape | None  # None: no line has one
    examples: int
    tokens: int
    trained_tokens: int
    truncated: int  # examples longer than max_tokens, whose beginning is left out
    dropped: int  # examples of which no target is left after that
    max_length: int  # tokens of the longest example, before truncation
    problems: list[Problem]  # the first ones
    total_problems: int


class Limits(msgspec.Struct, frozen=True):
    """What a file may hold. `seconds` bounds the time that reading it may take."""

    file_bytes: int = 64 << 20
    line_bytes: int = 1 << 20
    examples: int = 100_000
    messages: int = 128  # of an example
    tokens: int = 20_000_000
    problems: int = 50  # listed in a report
    seconds: float = 120.0


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out), both in the given order. Which is which depends on seed and tokens alone.

    Examples with the same tokens stay together. About `share` of all is held out: at least one example if
    `share` is over 0 and two of them differ, and never all.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(tuple(example.tokens), []).append(index)
    drawn = [groups[tokens] for tokens in sorted(groups, key=lambda tokens: _draw(seed, tokens))]
    wanted = max(1, round(share * len(examples))) if share > 0 and len(groups) > 1 else 0
    held: set[int] = set()
    for group in drawn:
        if len(held) + len(group) <= wanted:
            held.update(group)
    if wanted and not held:  # every group is larger than the share
        held.update(min(drawn, key=len))
    return (
        [example for index, example in enumerate(examples) if index not in held],
        [example for index, example in enumerate(examples) if index in held],
    )


def _draw(seed: int, tokens: tuple[int, ...]) -> bytes:
    """A random number for a sequence: more examples in a file move none from one side to the other."""
    return sha256(repr((seed, tokens)).encode()).digest()
