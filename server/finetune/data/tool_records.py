"""Functions, calls and results in a training record, as OpenAI's chats have them, in either of two shapes.

`tools` beside the messages, `tool_calls` of an assistant and `tool_call_id` of a result; or, deprecated,
`functions`, `function_call` and messages of the role function. Rendering: base_model/chat_tools.py.
"""

import re
from typing import Any

from server.base_model.chat_tools import MAX_DEPTH
from server.errors import shown
from server.finetune.data.jsonl import LineError, described
from server.json_reader import is_deeper

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
DEPRECATED_ID = "function"  # of a call in the deprecated shape, which has none
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


def tools_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of a record, for the chat template. Raises LineError."""
    if "tools" in line and "functions" in line:
        raise LineError("functions", "functions cannot go with tools.")
    if not isinstance(line.get("parallel_tool_calls", True), bool):
        raise LineError("parallel_tool_calls", "parallel_tool_calls must be true or false.")
    field = "functions" if "functions" in line else "tools"
    value = line.get(field, [])
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise LineError(field, f"{field} must be a list of at most {MAX_TOOLS} functions.")
    return [_tool(f"{field}[{i}]", item, bare=field == "functions") for i, item in enumerate(value)]


def _tool(path: str, value: Any, *, bare: bool) -> dict[str, Any]:
    function = value
    if not bare:
        if (
            not isinstance(value, dict)
            or value.get("type") != "function"
            or value.keys() - {"type", "function"}
        ):
            raise LineError(path, f'{path} must be {{"type": "function", "function": ...}}.')
        path, function = f"{path}.function", value.get("function")
    if not isinstance(function, dict):
        raise LineError(path, f"{path} must be an object, not {described(function)}.")
    present = {name: item for name, item in function.items() if item is not None}
    if unknown := present.keys() - {"name", "description", "parameters", "strict"}:
        raise LineError(path, f"{shown(min(unknown))} is not a field of a function.")
    description = present.get("description", "")
    parameters = present.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise LineError(path, f"{path} must have text as description and a schema as parameters.")
    if is_deeper(parameters, MAX_DEPTH):
        raise LineError(path, f"{path}.parameters is nested deeper than {MAX_DEPTH} levels.")
    described_by = {"description": description} if "description" in present else {}
    name = _name(f"{path}.name", present.get("name"))
    return {"type": "function", "function": {"name": name, **described_by, "parameters": parameters}}


def calls_of(path: str, message: dict[str, Any]) -> list[dict[str, str]]:
    """The calls of a message, each with id, name and arguments. Raises LineError."""
    if "function_call" in message:
        return [_call(f"{path}.function_call", message["function_call"], DEPRECATED_ID)]
    field, calls = f"{path}.tool_calls", message.get("tool_calls", [])
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise LineError(field, f"{field} must be a list of at most {MAX_CALLS} calls.")
    found = []
    for i, call in enumerate(calls):
        if (
            not isinstance(call, dict)
            or call.get("type", "function") != "function"
            or not _is_id(call.get("id"))
        ):
            raise LineError(
                f"{field}[{i}]", f'{field}[{i}] must be {{"id": ..., "type": "function", "function": ...}}.'
            )
        found.append(_call(f"{field}[{i}].function", call.get("function"), call["id"]))
    return found


def result_id(path: str, message: dict[str, Any], role: Any, calls: dict[str, str]) -> str | None:
    """Of which call a message is the result; None if it does not say. `calls`: names by id, so far."""
    if role == "function":
        id_: Any = DEPRECATED_ID
    elif "tool_call_id" not in message:
        return None
    else:
        id_ = message["tool_call_id"]
    field = f"{path}.tool_call_id"
    if role not in ("tool", "function"):
        raise LineError(field, f"{field} is only for the results of calls.")
    if not isinstance(id_, str) or id_ not in calls:
        raise LineError(field, f"{field} must be the id of a call before it, not {described(id_)}.")
    return id_


def _call(path: str, value: Any, id_: str) -> dict[str, str]:
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        raise LineError(path, f"{path} must be an object with name and arguments, not {described(value)}.")
    if not isinstance(value["arguments"], str):
        raise LineError(
            f"{path}.arguments",
            f"{path}.arguments must be JSON as text, not {described(value['arguments'])}.",
        )
    return {"id": id_, "name": _name(f"{path}.name", value["name"]), "arguments": value["arguments"]}


def _name(path: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise LineError(
            path, f"{path} must be letters, digits, _ and -, at most 128, not {described(value)}."
        )
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 512
