"""The makers of training files: what they yield is sound, repeatable, and never on both sides."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tasks
from benchmarks.support.debian import package_folder
from benchmarks.tasks import TASKS, lines_of
from server.base_model.tokenizer import Tokenizer
from server.finetune.data.dataset import check

INDEX = """  1 the licence
dog n 1 1 @ 1 1 00000001
hound n 1 1 @ 1 0 00000001
bank n 2 1 @ 2 2 00000002 00000003
paris n 1 1 @ 1 1 00000003
zebra n 1 1 @ 1 0 00000004
dog-ear n 1 1 @ 1 1 00000004
"""
DATA = """  1 the licence
00000001 05 n 01 dog 0 001 @ 00000004 n 0000 | a tame animal; "the dog barked all night"
00000002 06 n 01 bank 0 001 @ 00000004 n 0000 | a building (for money)
00000003 15 n 01 paris 0 001 @ 00000004 n 0000 | the capital of France: "Paris is big"
00000004 05 n 01 zebra 0 001 @ 00000004 n 0000 | a striped animal
"""
COUNTS = (
    "dog%1:05:00:: 1 9\nhound%1:05:00:: 1 1\nbank%1:06:00:: 1 1\nparis%1:15:00:: 1 1\nzebra%2:30:00:: 1 1\n"
)
COOKIES = """Absent, adj.:
\tExposed to the attacks
\tof friends.
%
A law of computing:
\tSomething else.
%
Data, n.:
\tMore than one.
\t\t-- Somebody, "Something"
"""


@pytest.fixture(scope="module", autouse=True)
def _modules_are_read_once() -> Iterator[None]:
    """All of Python's library, whose docstrings are the titles."""
    task = TASKS["titles"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "titles", task._replace(make=cache(lambda: list(task.make()))))
        yield


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages, a few lines long, in the formats of their files."""
    files = {"index.noun": INDEX, "data.noun": DATA, "cntlist.rev": COUNTS, "definitions": COOKIES}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(tasks, "package_folder", lambda package, inside: tmp_path)


def asked(line: dict[str, Any]) -> tuple[str, str]:
    question, answer = line["messages"]
    return question["content"], answer["content"]


@pytest.mark.parametrize("task", ["sentiment", "titles"])
def test_lines_make_sound_files(task: str, tmp_path: Path, smollm2: Path) -> None:
    train, test = lines_of(task)
    assert len(train) >= 300
    assert len(test) >= 50
    assert not {json.dumps(line) for line in train} & {json.dumps(line) for line in test}
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in train))
    report = check(path, Tokenizer.load(smollm2), 512)
    assert (report.total_problems, report.examples) == (0, len(train))


def test_sentiments_are_balanced_and_no_word_is_tested_whose_kin_is_learnt() -> None:
    train, test = lines_of("sentiment")
    assert (train, test) == lines_of("sentiment")
    labels = Counter(line["completion"] for line in train)
    assert abs(labels[" positive"] - labels[" negative"]) < 0.1 * len(train)
    stems = [{line["prompt"].split()[1][:5] for line in side} for side in (train, test)]
    assert not stems[0] & stems[1]


def test_titles_come_from_many_modules_and_from_no_tests() -> None:
    modules = [Path(group).parts for group, _ in TASKS["titles"].make()]
    assert len(set(modules)) > 50
    assert not {"test", "tests", "idlelib", "site-packages"} & {part for module in modules for part in module}


@pytest.mark.usefixtures("debian")
def test_kinds_are_of_nouns_whose_senses_agree() -> None:
    found = {question.split("'")[1]: answer for question, answer in map(asked, dict_lines("kinds"))}
    assert found == {"dog": "animal", "hound": "animal", "paris": "place"}


@pytest.mark.usefixtures("debian")
def test_definitions_are_the_first_senses_without_examples_and_synonyms_stay_together() -> None:
    assert dict(map(asked, dict_lines("definitions"))) == {
        "Define the noun 'dog'.": "a tame animal",
        "Define the noun 'hound'.": "a tame animal",
        "Define the noun 'bank'.": "a building (for money)",
        "Define the noun 'paris'.": "the capital of France",
    }
    groups = [group for group, _ in TASKS["definitions"].make()]
    assert groups == ["00000001", "00000001", "00000002", "00000003"]


@pytest.mark.usefixtures("debian")
def test_a_style_is_words_and_meanings_without_who_said_so() -> None:
    assert dict_lines("style") == [
        {"text": "Absent, adj.: Exposed to the attacks of friends."},
        {"text": "Data, n.: More than one."},
    ]


def dict_lines(task: str) -> list[dict[str, Any]]:
    return [line for _, line in TASKS[task].make()]


def test_an_installed_package_is_used_where_it_is() -> None:
    assert package_folder("base-files", "usr") == Path("/usr")
