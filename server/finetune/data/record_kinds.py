"""The kinds of records in a training file, and their checks field by field. No tokenizer.

    {"messages": [{"role", "content", "weight"?}]}    OpenAI's: trains on assistant turns, except of weight 0;
                                                      with functions: tool_records.py
    {"prompt": ..., "completion": ...}                texts or, as in trl, lists of messages
    {"text": ...}                                     trains on all of it

A field that is null counts as absent: tools that export tables fill columns with null.
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from server.errors import shown
from server.finetune.data.jsonl import LineError, described
from server.finetune.data.tool_records import calls_of, result_id, tools_of

RecordKind = Literal["messages", "prompt_completion", "text"]
FIELDS: dict[RecordKind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TOOL_FIELDS = ("tools", "functions", "parallel_tool_calls")
_REFUSED = dict.fromkeys(TOOL_FIELDS, "functions go with messages")
_REFUSED_IN_MESSAGE = {
    "refusal": "an answer that refuses stands in content",
    "audio": "this server hears no audio",
}
_MESSAGE_FIELDS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call")


class Chat(msgspec.Struct, frozen=True):
    """`targets`: indices in `messages` of the assistant turns to learn; at least one, and never 0."""

    messages: list[dict[str, Any]]  # for Tokenizer.render_chat
    fields: list[str]  # the path of each message in the line, such as "completion[0]"
    targets: list[int]
    tools: list[dict[str, Any]] = []  # functions, for Tokenizer.render_chat


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
    tool_calls: list[dict[str, str]] = []
    tool_call_id: str | None = None
    function: str = ""  # of which it is the result

    @property
    def plain(self) -> dict[str, Any]:
        """For Tokenizer.render_chat."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            plain["tool_calls"] = self.tool_calls
        if self.tool_call_id is not None:
            plain |= {"tool_call_id": self.tool_call_id, "name": self.function}
        return plain


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
    chat = shape == "messages" or isinstance(present.get("prompt"), list)
    known = FIELDS[shape] + (TOOL_FIELDS if chat else ())
    _check_fields(present, known, "", {} if chat else _REFUSED)
    for field in FIELDS[shape]:
        if field not in present:
            raise LineError(field, f"{field} is required.")
    if shape == "messages":
        turns = _messages("messages", present["messages"], max_messages, weighted=True)
        return _chat("messages", [], turns, tools_of(present))
    if shape == "text":
        return Text(_learnable("text", present["text"]))
    return _prompt_completion(present, max_messages)


def _prompt_completion(line: dict[str, Any], max_messages: int) -> Chat | Pair:
    prompt, completion = line["prompt"], line["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Pair(prompt, _learnable("completion", completion))
    if isinstance(prompt, list) and isinstance(completion, list):
        calls: dict[str, str] = {}  # of the prompt, which the completion may answer
        context = _messages("prompt", prompt, max_messages, weighted=False, calls=calls)
        turns = _messages("completion", completion, max_messages, weighted=True, calls=calls)
        return _chat("completion", context, turns, tools_of(line))
    raise LineError(
        "prompt",
        "prompt and completion must both be text, or both be lists of messages, not "
        f"{described(prompt)} and {described(completion)}.",
    )


def _chat(field: str, context: list[_Message], turns: list[_Message], tools: list[dict[str, Any]]) -> Chat:
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
        if not turns[i].tool_calls:
            _learnable(f"{field}[{i}].content", turns[i].content)
    messages = [*context, *turns]
    return Chat(
        [message.plain for message in messages],
        [message.field for message in messages],
        [len(context) + i for i in targets],
        tools,
    )


def _messages(
    field: str, value: Any, limit: int, *, weighted: bool, calls: dict[str, str] | None = None
) -> list[_Message]:
    """`calls`: names of functions by the ids of calls before, to which those of these messages are added."""
    if not isinstance(value, list):
        raise LineError(field, f"{field} must be a list of messages, not {described(value)}.")
    if not value:
        raise LineError(field, f"{field} has no messages.")
    if len(value) > limit:
        raise LineError(field, f"{field} must have at most {limit} messages, not {len(value)}.")
    calls = {} if calls is None else calls
    return [_message(f"{field}[{i}]", message, weighted, calls) for i, message in enumerate(value)]


def _message(path: str, value: Any, weighted: bool, calls: dict[str, str]) -> _Message:
    if not isinstance(value, dict):
        raise LineError(path, f"{path} must be an object with role and content, not {described(value)}.")
    present = _without_nulls(value)
    _check_fields(present, _MESSAGE_FIELDS, path, _REFUSED_IN_MESSAGE)
    role = present.get("role")
    if role not in ROLES:
        raise LineError(
            f"{path}.role", f"{path}.role must be one of {', '.join(ROLES)}, not {described(role)}."
        )
    called = calls_of(path, present)
    if called and role != "assistant":
        raise LineError(path, f"{path} has calls, which only an assistant makes.")
    answered = result_id(path, present, role, calls)
    content = _content(f"{path}.content", present.get("content", "" if called else None))
    if not isinstance(present.get("name", ""), str):  # accepted, but not shown to the model, as in serving
        raise LineError(f"{path}.name", f"{path}.name must be text, not {described(present['name'])}.")
    if "weight" in present and (role != "assistant" or not weighted):
        raise LineError(f"{path}.weight", f"{path}.weight is only for assistant turns that may be learnt.")
    weight = present.get("weight", int(role == "assistant"))
    if isinstance(weight, bool) or weight not in (0, 1):
        raise LineError(f"{path}.weight", f"{path}.weight must be 0 or 1, not {described(weight)}.")
    calls |= {call["id"]: call["name"] for call in called}
    role = {"developer": "system", "function": "tool"}.get(role, role)
    return _Message(path, role, content, int(weight), called, answered, calls.get(answered or "", ""))


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
