"""Messages of a body as the tokenizer takes them (chat_tools.py), after the check of calls and results."""

from collections.abc import Sequence
from typing import Any, Protocol

from server.api.tools.bodies import FunctionCall, ToolCall
from server.errors import InvalidField, InvalidRequest

DEPRECATED_ID = "function"  # of calls in the deprecated shape, which have none


class _Message(Protocol):
    """The fields of a body's message that are read here."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> object: ...
    @property
    def text(self) -> str: ...
    @property
    def name(self) -> str | None: ...
    @property
    def tool_calls(self) -> list[ToolCall] | None: ...
    @property
    def tool_call_id(self) -> str | None: ...
    @property
    def function_call(self) -> FunctionCall | None: ...


def conversation(messages: Sequence[_Message]) -> list[dict[str, Any]]:
    """The messages for `Tokenizer.render_chat`.

    Raises InvalidField for a field that the role lacks or may not have, InvalidRequest for a result without
    its call, or a call without its result.
    """
    plain: list[dict[str, Any]] = []
    calls: dict[str, str] = {}  # of the last assistant's turn: name of the function by id
    unanswered: list[str] = []
    for i, message in enumerate(messages):
        _check_fields(message, f"messages.{i}")
        if message.role in ("tool", "function"):
            id_ = message.tool_call_id or DEPRECATED_ID
            if id_ not in calls:
                raise _orphan(message.role, i)
            unanswered = [other for other in unanswered if other != id_]
            result = {"tool_call_id": id_, "name": calls[id_]}
            plain.append({"role": "tool", "content": message.text} | result)
            continue
        _check_answered(unanswered, i)
        called = _calls(message)
        calls = {call["id"]: call["name"] for call in called}
        unanswered = list(calls)
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": message.text} | ({"tool_calls": called} if called else {}))
    _check_answered(unanswered, len(messages))
    return plain


def _check_fields(message: _Message, path: str) -> None:
    role = message.role
    if message.content is None and role not in ("assistant", "function"):
        raise _missing(f"{path}.content")
    if message.tool_call_id is None and role == "tool":
        raise _missing(f"{path}.tool_call_id")
    if role != "assistant" and (message.tool_calls or message.function_call):
        raise InvalidField(f"{path}.role must be assistant for calls, not {role}.", param=f"{path}.role")


def _missing(path: str) -> InvalidField:
    return InvalidField(f"{path} is required.", param=path, code="missing_field")


def _calls(message: _Message) -> list[dict[str, str]]:
    if message.function_call is not None:
        call = message.function_call
        return [{"id": DEPRECATED_ID, "name": call.name, "arguments": call.arguments}]
    return [
        {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
        for call in message.tool_calls or []
    ]


def _orphan(role: str, index: int) -> InvalidRequest:
    """OpenAI's sentence, spelling included: clients look for it."""
    before = "tool_calls" if role == "tool" else "function_call"
    return InvalidRequest(
        f"Invalid parameter: messages with role '{role}' must be a response to a preceeding message with "
        f"'{before}'.",
        param=f"messages.[{index}].role",
    )


def _check_answered(unanswered: list[str], index: int) -> None:
    if unanswered == [DEPRECATED_ID]:  # OpenAI asks for no result of a deprecated call
        return
    if unanswered:
        raise InvalidRequest(
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            "'tool_call_id'. The following tool_call_ids did not have response messages: "
            + ", ".join(id_[:64] for id_ in unanswered),
            param=f"messages.[{index}].role",
        )
