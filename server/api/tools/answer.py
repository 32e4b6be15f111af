"""An answer as OpenAI's deltas: text, and calls in either of the two shapes.

A stream sends the deltas; an answer in one piece is their sum (`add_delta`), so the two cannot differ.
"""

import secrets
import string
from typing import Any, Protocol

from server.api.tools.call_parser import Arguments, CallBegins, CallParser, Event
from server.api.tools.tool_use import ToolUse
from server.base_model.tool_formats import ToolFormat

ID_CHARS = 24
_ALPHABET = string.ascii_letters + string.digits
Delta = dict[str, Any]


class Answer(Protocol):
    """One choice: what its text becomes."""

    def deltas(self, text: str, *, last: bool) -> list[Delta]:
        """The deltas of the next part of the text; `last`: of the end of it."""

    def finish_reason(self, reason: str) -> str:
        """OpenAI's reason, for the engine's."""


class TextAnswer:
    """An answer without calls."""

    def deltas(self, text: str, *, last: bool) -> list[Delta]:  # noqa: ARG002 - nothing is withheld
        return [{"content": text}] if text else []

    def finish_reason(self, reason: str) -> str:
        return reason


class AnswerWithCalls:
    """An answer that may have calls."""

    def __init__(self, format_: ToolFormat, use: ToolUse, *, constrained: bool) -> None:
        """`constrained`: a grammar holds the answer to the format."""
        names = {function.name for function in use.callable}
        limit = None if use.parallel else 1
        self._parser = CallParser(format_, names, streamed=constrained, max_calls=limit)
        self._use = use
        self._calls = 0

    def deltas(self, text: str, *, last: bool) -> list[Delta]:
        events = self._parser.push(text)
        if last:
            events += self._parser.flush()
        return [self._delta(event) for event in events]

    def finish_reason(self, reason: str) -> str:
        """As OpenAI's: an answer that had to call a named function ends with stop."""
        if not self._calls or reason != "stop" or self._use.mode == "named":
            return reason
        return "function_call" if self._use.deprecated else "tool_calls"

    def _delta(self, event: Event) -> Delta:
        if isinstance(event, CallBegins):
            self._calls += 1
            return self._call(function={"name": event.name, "arguments": ""}, begins=True)
        if isinstance(event, Arguments):
            return self._call(function={"arguments": event.text}, begins=False)
        return {"content": event.text}

    def _call(self, function: dict[str, str], begins: bool) -> Delta:
        if self._use.deprecated:
            return {"function_call": function}
        first = {"id": call_id(), "type": "function"} if begins else {}
        return {"tool_calls": [{"index": self._calls - 1, **first, "function": function}]}


def call_id() -> str:
    return "call_" + "".join(secrets.choice(_ALPHABET) for _ in range(ID_CHARS))


def add_delta(message: dict[str, Any], delta: Delta) -> None:
    """Add what a delta says to the message of a whole answer."""
    if "content" in delta:
        message["content"] = (message["content"] or "") + delta["content"]
    if function := delta.get("function_call"):
        call = message.setdefault("function_call", {"name": "", "arguments": ""})
        _add_function(call, function)
    for piece in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in piece:
            calls.append(
                {"id": piece["id"], "type": piece["type"], "function": {"name": "", "arguments": ""}}
            )
        _add_function(calls[piece["index"]]["function"], piece["function"])


def _add_function(call: dict[str, str], piece: dict[str, str]) -> None:
    for field, text in piece.items():
        call[field] += text
