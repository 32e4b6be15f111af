"""Finds the calls in an answer's text as it arrives, in any format of base_model/tool_formats.

The text is read character by character, so it does not matter how it is cut into tokens. What could be the
beginning of a call is withheld until that is known. What turns out to be none, because it is no JSON or names
no function, is text like any other.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto

from server.api.tools.call_reader import CallReader, Part
from server.base_model.tool_formats import ToolFormat

SEPARATORS = frozenset(" \t\r\n,;[]")  # between two calls, in one format or another


@dataclass(frozen=True)
class Text:
    """A part of the answer that is no call."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """The next call, and the function it names."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of the last call's arguments, which are JSON."""

    text: str


Event = Text | CallBegins | Arguments


class _State(Enum):
    START = auto()  # nothing but white space yet
    TEXT = auto()
    BETWEEN = auto()  # calls have begun; no call is open
    CALL = auto()


class CallParser:
    """The parser of one answer: `push` its text, then `flush`.

    `streamed`: a grammar holds the answer to the format, so arguments come out as they arrive. Otherwise a
    call comes out when it is complete and correct. `max_calls`: later ones are dropped.
    """

    def __init__(
        self, format_: ToolFormat, names: Collection[str], *, streamed: bool, max_calls: int | None = None
    ) -> None:
        self._format = format_
        self._names = names
        self._streamed = streamed
        self._calls_left = max_calls
        self._state = _State.START if format_.bare else _State.TEXT
        self._markers = [marker for marker in (format_.after.strip(), format_.begin) if marker]
        self._held = ""  # text that is not sent yet
        self._section: list[str] = []  # characters since the calls began, or since the last call
        self._marker = ""  # the beginning of a marker between calls
        self._call = CallReader(format_)
        self._had_call = self._text_after_call = False
        self._dropped = False  # the call that is open
        self._events: list[Event] = []
        self._arguments: list[str] = []

    def push(self, text: str) -> list[Event]:
        """The events that `text` completes."""
        while text:
            if self._state in (_State.START, _State.TEXT):
                self._held += text
                text = self._read_text()
            else:
                text = self._read_calls(text)
        return self._take_events()

    def flush(self) -> list[Event]:
        """The events that were withheld, at the end of the answer."""
        if self._state in (_State.BETWEEN, _State.CALL) and not self._call.begun:
            self._give_up()
        self._send(self._held)
        self._held = ""
        return self._take_events()

    def _read_text(self) -> str:
        """Send what is text in `_held`; the rest, if calls begin in it."""
        held, begin = self._held, self._format.begin
        if self._state is _State.START:
            body = held.lstrip()
            if body:
                self._state = _State.TEXT
            if body[:1] in ("{", "["):
                return self._begin_calls(held[: -len(body)], body)
        found = held.find(begin) if begin else -1
        if found >= 0:
            text = held[:found].rstrip()
            self._send(text)
            return self._begin_calls(held[len(text) : found] + begin, held[found + len(begin) :])
        ready = len(held) - _overlap(held, begin)
        sent = held[:ready].rstrip()  # white space before a call is dropped
        self._send(sent)
        self._held = held[len(sent) :]
        return ""

    def _begin_calls(self, begin: str, rest: str) -> str:
        self._state = _State.BETWEEN if self._format.wrapped else _State.CALL
        self._section, self._held, self._marker = [begin], "", ""
        self._call = CallReader(self._format)
        return rest

    def _read_calls(self, text: str) -> str:
        """Read `text` up to the end of the calls; the rest."""
        for at, char in enumerate(text):
            self._section.append(char)
            if self._state is _State.CALL:
                self._read_call(char)
            else:
                self._read_between(char)
            if self._state is _State.TEXT:
                return text[at + 1 :]
        return ""

    def _read_between(self, char: str) -> None:
        if char == "{" and not self._marker:
            self._state, self._call = _State.CALL, CallReader(self._format)
            self._read_call(char)
            return
        if char in SEPARATORS and not self._marker:
            return
        self._marker += char
        if self._marker == self._format.begin:
            self._marker = ""
        elif self._marker in self._markers:
            if self._had_call:
                self._section = []
            self._give_up()  # without a call, all of it is text
        elif not any(marker.startswith(self._marker) for marker in self._markers):
            self._give_up()

    def _read_call(self, char: str) -> None:
        call = self._call
        part = call.read(char)
        if part is Part.OPENING and self._streamed and call.name in self._names:
            call.begun = True
            self._begin_call(call.name)
        if call.begun and part in (Part.OPENING, Part.ARGUMENTS):
            self._arguments.append(char)
        if call.wrong:
            self._give_up()
        elif call.closed:
            self._end_call(call)

    def _end_call(self, call: CallReader) -> None:
        if not call.begun:
            name, arguments = call.parsed() or ("", "")
            if name not in self._names:
                self._give_up()
                return
            self._begin_call(name)
            self._arguments.append(arguments)
        self._section = []
        self._state = _State.BETWEEN if self._format.wrapped else _State.TEXT
        self._call = CallReader(self._format)

    def _give_up(self) -> None:
        """The characters since the last call are text."""
        section = "".join(self._section)
        self._section, self._state = [], _State.TEXT
        if not self._had_call or not SEPARATORS.issuperset(section):
            self._send(section)

    def _begin_call(self, name: str) -> None:
        self._had_call, self._text_after_call = True, False
        self._send_arguments()
        self._dropped = self._calls_left == 0
        if not self._dropped:
            self._events.append(CallBegins(name))
        if self._calls_left:
            self._calls_left -= 1

    def _send(self, text: str) -> None:
        """Text, but not the white space around calls."""
        if self._had_call and not self._text_after_call:
            text = text.lstrip()
        if text:
            self._text_after_call = self._had_call
            self._send_arguments()
            self._events.append(Text(text))

    def _send_arguments(self) -> None:
        if self._arguments and not self._dropped:
            self._events.append(Arguments("".join(self._arguments)))
        self._arguments = []

    def _take_events(self) -> list[Event]:
        self._send_arguments()
        events, self._events = self._events, []
        return events


def _overlap(text: str, marker: str) -> int:
    """Characters at the end of `text` that may be the beginning of `marker`."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
