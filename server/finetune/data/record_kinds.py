"""The kinds of records in a training file, and their checks field by field. No tokenizer.

    {"messages": [{"role", "content", "weight"?}]}    OpenAI's: trains on assistant turns, except of weight 0
    {"prompt": ..., "completion": ...}                texts or, as in trl, lists of messages
    {"text": ...}                                     trains on all of it

A field that is null counts as absent: tools that export tables fill columns with null.
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from server.errors import shown
from server.finetune.data.jsonl import LineError, described

RecordKind = Literal["messages", "prompt_completion", "text"]
FIELDS: dict[RecordKind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
_NO_TOOLS = "this server calls no tools"
_REFUSED = dict.fromkeys(("tools", "functions", "parallel_tool_calls"), _NO_TOOLS)
_REFUSED_IN_MESSAGE = dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), _NO_TOOLS) | {
    "refusal": "an answer that refuses stands in content",
    "audio": "this server hears no audio",
}


class Chat(msgspec.Struct, frozen=True):
    """`targets`: indices in `messages` of the assistant turns to learn; at least one, and never 0."""

    messages: list[dict[str, str]]
    fields: list[str]  # the path of each message in the line, such as "completion[0]"
    targets: list[int]


class Pair(msgspec.Struct, frozen=True):
    """A prompt, and a completion as the target."""

    prompt: str
    completion: str


class Text(msgspec.Struct, frozen=True):
    """A text, all of which is a target."""

    text: str


class _Message(msgspec.Struct, frozen=True):
    field: str  # its path in the line
    role: str
    content: str
    weight: int  # 0 for all other roles than assistant


def record_kind(line: dict[str, Any]) -> RecordKind:
    """The kind of a record by the names of its fields. Raises LineError if they fit none, or two."""
    present = _without_nulls(line).keys()
    shapes = [shape for shape, fields in FIELDS.items() if present & set(fields)]
    if not shapes:
        raise LineError("", "The line has neither messages nor prompt and completion nor text.")
    if len(shapes) > 1:
        raise LineError(
            "", f"The line has the fields of {shapes[0]} and of {shapes[1]}; it must have one shape."
        )
    return shapes[0]


def read_record(shape: RecordKind, line: dict[str, Any], max_messages: int) -> Chat | Pair | Text:
    """The checked record. Raises LineError for the first field that is missing, unknown or wrong."""
    present = _without_nulls(line)
    _check_fields(present, FIELDS[shape], "", _REFUSED)
    for field in FIELDS[shape]:
        if field not in present:
            raise LineError(field, f"{field} is required.")
    if shape == "messages":
        return _chat("messages", [], _messages("messages", present["messages"], max_messages, weighted=True))
    if shape == "text":
        return Text(_learnable("text", present["text"]))
    return _prompt_completion(present["prompt"], present["completion"], max_messages)


def _prompt_completion(prompt: Any, completion: Any, max_messages: int) -> Chat | Pair:
    if isinstance(prompt, str) and isinstance(completion, str):
        return Pair(prompt, _learnable("completion", completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        context = _messages("prompt", prompt, max_messages, weighted=False)
        return _chat("completion", context, _messages("completion", completion, max_messages, weighted=True))
    raise LineError(
        "prompt",
        "prompt and completion must both be text, or both be lists of messages, not "
        f"{described(prompt)} and {described(completion)}.",
    )


def _chat(field: str, context: list[_Message], turns: list[_Message]) -> Chat:
    """A conversation whose targets are in `turns`, the value of `field`. Raises LineError."""
    if not any(turn.role == "assistant" for turn in turns):
        raise LineError(field, f"{field} has no assistant turn, so there is nothing to learn.")
    if turns[-1].role != "assistant":
        raise LineError(field, f"{field} must end with an assistant turn, not one of {turns[-1].role}.")
    targets = [i for i, turn in enumerate(turns) if turn.weight]
    if not targets:
        raise LineError(
            field, f"{field} gives weight 0 to every assistant turn, so there is nothing to learn."
        )
    if targets[0] + len(context) == 0:
        raise LineError(f"{field}[0]", f"{field}[0] is an assistant turn with nothing before it to answer.")
    for i in targets:
        _learnable(f"{field}[{i}].content", turns[i].content)
    messages = [*context, *turns]
    return Chat(
        [{"role": message.role, "content": message.content} for message in messages],
        [message.field for message in messages],
        [len(context) + i for i in targets],
    )


def _messages(field: str, value: Any, limit: int, *, weighted: bool) -> list[_Message]:
    if not isinstance(value, list):
        raise LineError(field, f"{field} must be a list of messages, not {described(value)}.")
    if not value:
        raise LineError(field, f"{field} has no messages.")
    if len(value) > limit:
        raise LineError(field, f"{field} must have at most {limit} messages, not {len(value)}.")
    return [_message(f"{field}[{i}]", message, weighted) for i, message in enumerate(value)]


def _message(path: str, value: Any, weighted: bool) -> _Message:
    if not isinstance(value, dict):
        raise LineError(path, f"{path} must be an object with role and content, not {described(value)}.")
    present = _without_nulls(value)
    _check_fields(present, ("role", "content", "name", "weight"), path, _REFUSED_IN_MESSAGE)
    role = present.get("role")
    if role not in ROLES:
        raise LineError(
            f"{path}.role", f"{path}.role must be one of {', '.join(ROLES)}, not {described(role)}."
        )
    content = _content(f"{path}.content", present.get("content"))
    if not isinstance(present.get("name", ""), str):  # accepted, but not shown to the model, as in serving
        raise LineError(f"{path}.name", f"{path}.name must be text, not {described(present['name'])}.")
    if "weight" in present and (role != "assistant" or not weighted):
        raise LineError(f"{path}.weight", f"{path}.weight is only for assistant turns that may be learnt.")
    weight = present.get("weight", int(role == "assistant"))
    if isinstance(weight, bool) or weight not in (0, 1):
        raise LineError(f"{path}.weight", f"{path}.weight must be 0 or 1, not {described(weight)}.")
    return _Message(path, "system" if role == "developer" else role, content, int(weight))


def _content(path: str, value: Any) -> str:
    """Text, or OpenAI's list of text parts. It may be empty, as in serving."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise LineError(path, f"{path} must be text or a list of text parts, not {described(value)}.")
    texts = []
    for i, part in enumerate(value):
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        text = part["text"] if is_text else None
        if not isinstance(text, str):
            raise LineError(f"{path}[{i}]", f'{path}[{i}] must be {{"type": "text", "text": ...}}.')
        texts.append(text)
    return "".join(texts)


def _learnable(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise LineError(path, f"{path} must be text, not {described(value)}.")
    if not value.strip():
        raise LineError(path, f"{path} is blank, so there is nothing to learn.")
    return value


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if item is not None}


def _check_fields(present: Iterable[str], known: tuple[str, ...], path: str, refused: dict[str, str]) -> None:
    for name in present:
        if name in refused:
            raise LineError(f"{path}.{name}".lstrip("."), f"{name} is not supported: {refused[name]}.")
        if name not in known:
            raise LineError(path, f"{shown(name)} is not a field here; known are {', '.join(known)}.")
