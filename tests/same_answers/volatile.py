"""What differs from run to run, as placeholders: ids, secrets, times, ports. Equal values get equal ones."""

import json
import re
from collections import defaultdict

PATTERNS = {
    "request": r"req_[0-9a-f]{32}",
    "answer": r"(?:chatcmpl|cmpl)-[0-9a-f]+",
    "secret": r"pp-[A-Za-z0-9_-]{43}",
    "tenant": r"ten_[0-9a-f]{24}",
    "key": r"key_[0-9a-f]{16}",
    "file": r"file-[0-9a-f]{24}",
    "upload": r"upload_[0-9a-f]{24}",
    "part": r"part-[0-9a-f]{24}",
    "job": r"ftjob-[0-9a-f]{24}",
    "event": r"ftevent-[0-9a-f]{24}",
    "checkpoint": r"ftckpt-[0-9a-f]{24}",
    "change": r'(?<=")[0-9a-f]{32}(?=\\?")',
    "name": r"\bft-[0-9a-f]{8}\b",
    "etag": r'(?<=etag: ")[0-9a-f]{8,}(?=")',
    "time": r"(?<![\w.-])1[789]\d{8}(?:\d{3})?(?:\.\d+)?(?![\w.])",
    "date": r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(?::\d{2})?Z?|\w{3}, \d{2} \w{3} \d{4} [\d:]{8} GMT",
    "server": r"(?<=://)127\.0\.0\.1:\d+",
    "duration": r'(?<=silent_seconds": )\d+\.\d+|(?<="seconds": )\d+\.\d+',
    "worker": r'(?<=worker=")[0-9a-f]{8}(?=")',
}
_ANY = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in PATTERNS.items()))
# nothing else refers to them
UNNUMBERED = {"request", "answer", "time", "date", "server", "duration", "worker"}


class Placeholders:
    """Numbers each kind of value in the order in which it is first seen."""

    def __init__(self, *known: tuple[str, str]) -> None:
        """`known`: texts, such as paths, and what stands for them."""
        self._known = known
        self._seen: defaultdict[str, dict[str, int]] = defaultdict(dict)

    def replace(self, text: str) -> str:
        for value, name in self._known:
            text = text.replace(value, f"<{name}>")
        return _ANY.sub(self._placeholder, text)

    def _placeholder(self, match: "re.Match[str]") -> str:
        kind, value = str(match.lastgroup), match.group()
        if kind in UNNUMBERED:
            return f"<{kind}>"
        seen = self._seen[kind]
        return f"<{kind} {seen.setdefault(value, len(seen) + 1)}>"


def readable(text: str) -> str:
    """JSON on one line, on several; any other text, and JSON written in another manner, as it is.

    Loses nothing: what is not exactly as one way of writing it has it stays as it was.
    """
    lines = [_indented(line) for line in text.split("\n")]
    return "\n".join(lines)


def _indented(line: str) -> str:
    data, prefix = line.removeprefix("data: "), "data: " if line.startswith("data: ") else ""
    try:
        value = json.loads(data)
    except ValueError:
        return line
    if json.dumps(value, separators=(",", ":"), ensure_ascii=False) != data:
        return line
    return prefix + json.dumps(value, indent=1, ensure_ascii=False)
