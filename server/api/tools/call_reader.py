"""Reads one call, character by character: where its arguments begin and end, and what it says."""

import json
import re
from enum import Enum, auto
from typing import Any

from server.base_model.tool_formats import ToolFormat
from server.json_reader import JsonError, read_json

MAX_HEAD_CHARS = 1024  # before the arguments, in a format whose call is not one JSON object
_OBJECT_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


class Part(Enum):
    """What a character of a call belongs to."""

    HEAD = auto()
    OPENING = auto()  # the first brace of the arguments
    ARGUMENTS = auto()  # all others, up to the last brace
    TAIL = auto()


class CallReader:
    """A call that is being read: an object that holds name and arguments, or a head before the arguments."""

    def __init__(self, format_: ToolFormat) -> None:
        self.begun = False  # its name has been sent
        self.closed = False
        self.wrong = False
        self.name = ""  # known when the arguments open, in the usual order of fields
        self._inner = 2 if format_.wrapped else 1  # braces around what is inside the arguments
        self._head = _head_pattern(format_)
        self._text: list[str] = []
        self._arguments_at: int | None = None
        self._arguments_closed = False
        self._depth = 0
        self._in_string = self._escaped = False

    def read(self, char: str) -> Part:
        before = self._depth
        self._count(char)
        self._text.append(char)
        self.closed = self._depth == 0 and char == "}"
        if self._depth < 0 or (self._depth == 0 and not self.closed and len(self._text) > MAX_HEAD_CHARS):
            self.wrong = True
        if self._arguments_at is None:
            return self._open() if before < self._depth == self._inner else Part.HEAD
        if self._arguments_closed:
            return Part.TAIL
        self._arguments_closed = self._depth < self._inner
        return Part.ARGUMENTS

    def parsed(self) -> tuple[str, str] | None:
        """Name and arguments of a call that has closed; None if it is malformed."""
        text = "".join(self._text)
        try:
            if self._inner == 1:
                head = self._head.fullmatch(text[: self._arguments_at])
                return (head[1], _dumped(read_json(text[self._arguments_at :].encode()))) if head else None
            call = read_json(text.encode())
            arguments = call.get("arguments", call.get("parameters", {}))
            if isinstance(arguments, str):  # some models quote them
                arguments = read_json(arguments.encode())
        except JsonError:
            return None
        name = call.get("name")
        return (name, _dumped(arguments)) if isinstance(name, str) and isinstance(arguments, dict) else None

    def _open(self) -> Part:
        self._arguments_at = len(self._text) - 1
        head = self._head.fullmatch("".join(self._text[:-1]))
        self.name = head[1] if head else ""
        return Part.OPENING

    def _count(self, char: str) -> None:
        """Count braces outside strings."""
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = self._depth > 0
        elif char == "{":
            self._depth += 1
        elif char == "}":
            self._depth -= 1


def _dumped(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _head_pattern(format_: ToolFormat) -> re.Pattern[str]:
    """What stands before the arguments, with the function's name as its group."""
    if format_.wrapped:
        return _OBJECT_HEAD
    id_ = rf"(?:{re.escape(format_.call_id)}\w+)?" if format_.call_id else ""
    return re.compile(rf"\s*([\w-]+){id_}{re.escape(format_.head_of(''))}\s*")
