"""The classic tasks on real data, as training files: `python -m benchmarks.tasks sentiment FOLDER`.

    sentiment     is a word positive or negative                      prompt and completion
    kinds         what kind of thing is a noun: animal, food, ...     messages, answered by one word
    definitions   what does a noun mean                               messages
    titles        a one-line summary of a piece of documentation      messages
    style         definitions as a cynic would give them              text

Each makes TASK.train.jsonl and TASK.test.jsonl, the same on every run. What belongs together (abandon and
abandoned, synonyms, one class's documentation) is on one side only: what is tested was never learnt.
"""

import argparse
import ast
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.support.debian import package_folder

Line = dict[str, Any]
TRAIN, TEST = 1500, 200  # lines at most; a sixth of a smaller task is for testing


class Task(NamedTuple):
    """`make` yields lines, each with the name of the group that it belongs to."""

    make: Callable[[], Iterable[tuple[str, Line]]]
    source: str
    licence: str


def chat(question: str, answer: str) -> Line:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sentiment() -> Iterator[tuple[str, Line]]:
    """Words that ten people rated, where they agree that there is a sentiment, and as many of either."""
    located = distribution("vaderSentiment").locate_file("vaderSentiment/vader_lexicon.txt")
    rows = [line.split("\t") for line in Path(str(located)).read_text(encoding="utf-8").splitlines()]
    words = {
        word: float(mean) > 0
        for word, mean, deviation, *_ in rows
        if word.isalpha()
        and word.isascii()
        and len(word) > 2
        and abs(float(mean)) > max(1.0, float(deviation))
    }
    fewer = min(Counter(words.values()).values())
    for label in (True, False):
        for word in shuffled(word for word in words if words[word] is label)[:fewer]:
            completion = " positive" if label else " negative"
            yield word[:5], {"prompt": f"Word: {word}\nSentiment:", "completion": completion}


LEXNAMES = {"05": "animal", "06": "artifact", "08": "body", "12": "feeling", "13": "food"}
LEXNAMES |= {"15": "place", "18": "person", "20": "plant", "28": "time"}
A_KIND = 120  # words of one kind at most


def kinds() -> Iterator[tuple[str, Line]]:
    """Nouns in use whose every sense is of one kind."""
    nouns, senses = wordnet()
    found: dict[str, list[str]] = {name: [] for name in LEXNAMES.values()}
    for noun, offsets in nouns.items():
        files = {senses[offset][0] for offset in offsets}
        if len(files) == 1 and (name := LEXNAMES.get(files.pop())):
            found[name].append(noun)
    for name, words in found.items():
        for word in shuffled(words)[:A_KIND]:
            question = f"What kind of thing is {word!r}? Answer with one of: {', '.join(LEXNAMES.values())}."
            yield nouns[word][0], chat(question, name)


def definitions() -> Iterator[tuple[str, Line]]:
    nouns, senses = wordnet()
    for noun, offsets in nouns.items():
        meaning = re.split(r'; |: "| "', senses[offsets[0]][1])[0].strip(' ";:')
        if len(meaning) > 10:
            yield offsets[0], chat(f"Define the noun {noun!r}.", meaning)


def wordnet() -> tuple[dict[str, list[str]], dict[str, tuple[str, str]]]:
    """Nouns that occur in WordNet's tagged texts -> their senses; sense -> (lexicographer file, gloss)."""
    folder = package_folder("wordnet-base", "usr/share/wordnet")
    tagged = {
        line.partition("%")[0]
        for line in (folder / "cntlist.rev").read_text().splitlines()
        if line.partition("%")[2].startswith("1:")
    }
    senses: dict[str, tuple[str, str]] = {}
    for line in (folder / "data.noun").read_text().splitlines():
        if not line.startswith("  "):  # the licence
            fields, _, gloss = line.partition(" | ")
            offset, file = fields.split(" ", 2)[:2]
            senses[offset] = (file, gloss)
    nouns: dict[str, list[str]] = {}
    for line in (folder / "index.noun").read_text().splitlines():
        noun, *rest = line.split()
        if noun in tagged and noun.isalpha() and len(noun) > 2 and not line.startswith("  "):
            nouns[noun] = rest[-int(rest[1]) :]
    return nouns, senses


def titles() -> Iterator[tuple[str, Line]]:
    """Docstrings of the standard library: what follows the first line, and the first line."""
    root = Path(sysconfig.get_paths()["stdlib"])
    packages = [
        folder for folder in root.iterdir() if folder.name not in {"site-packages", "test", "idlelib"}
    ]
    for path in sorted([*root.glob("*.py"), *(path for folder in packages for path in folder.rglob("*.py"))]):
        if {"test", "tests"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # lib2to3's examples are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                title, _, body = (ast.get_docstring(node) or "").partition("\n\n")
                if re.fullmatch(r"[A-Z].{18,88}\.", title) and 120 <= len(body) <= 800 and ">>>" not in body:
                    name = path.relative_to(root).as_posix()
                    yield name, chat(f"Summarise this documentation in one line.\n\n{body}", title)


def style() -> Iterator[tuple[str, Line]]:
    """A word, and what it really means."""
    folder = package_folder("fortunes", "usr/share/games/fortunes")
    text = (folder / "definitions").read_text(encoding="utf-8", errors="replace").replace("\b", "")
    for entry in text.split("\n%\n"):
        said = re.split(r"\n\s+-- ", entry)[0]
        found = re.fullmatch(r"([A-Za-z][\w' -]*, [a-z.,]+):\n(.+)", said, re.DOTALL)
        if found:
            word, meaning = found[1], " ".join(found[2].split())
            yield word.lower(), {"text": f"{word}: {meaning}"}


TASKS = {
    "sentiment": Task(sentiment, "PyPI: vaderSentiment 3.3.2", "MIT"),
    "kinds": Task(kinds, "Debian: wordnet-base, WordNet 3.0", "WordNet 3.0, permissive"),
    "definitions": Task(definitions, "Debian: wordnet-base, WordNet 3.0", "WordNet 3.0, permissive"),
    "titles": Task(titles, "Python's own standard library", "PSF-2.0"),
    "style": Task(style, "Debian: fortunes", "BSD; single quotations are their authors'"),
}


def lines_of(task: str) -> tuple[list[Line], list[Line]]:
    """(to train with, to test with)."""
    groups: dict[str, list[Line]] = {}
    seen: set[str] = set()
    for group, line in TASKS[task].make():
        text = json.dumps(line)
        if text not in seen:
            seen.add(text)
            groups.setdefault(group, []).append(line)
    total = sum(map(len, groups.values()))
    wanted = min(TEST, total // 6)
    train: list[Line] = []
    test: list[Line] = []
    for name in shuffled(groups):
        (test if len(test) < wanted else train).extend(groups[name])
    return in_disorder(train)[:TRAIN], in_disorder(test)[:wanted]


def in_disorder(lines: list[Line]) -> list[Line]:
    return [json.loads(text) for text in shuffled(map(json.dumps, lines))]


def shuffled(names: Iterable[str]) -> list[str]:
    """In an order that depends on nothing but the names."""
    return sorted(names, key=lambda name: sha256(name.encode()).digest())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for side, lines in zip(("train", "test"), lines_of(args.task), strict=True):
        path = args.folder / f"{args.task}.{side}.jsonl"
        path.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
        print(f"{path}: {len(lines)} lines from {TASKS[args.task].source}, {TASKS[args.task].licence}")


if __name__ == "__main__":
    main()
