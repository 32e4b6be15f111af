"""Functions in a chat: how a base's template shows them, their calls and their results.

A template that names `tools` and writes calls in a known format renders all three itself. For any other the
functions are described in the system message, calls are written into the assistant's content, and results
are a user's message. Serving and training render alike.

A message here has `role` and `content`; an assistant's may have `tool_calls`, each with `id`, `name` and
`arguments` (JSON as text); a `tool` message has `tool_call_id` and `name`.
"""

import hashlib
import json
from typing import Any

from server.base_model.tool_formats import HERMES, TOOL_FORMATS, ToolFormat, format_of
from server.errors import StartupError
from server.json_reader import is_deeper

ChatMessage = dict[str, Any]
PREAMBLE = """You may call functions to help with the request. Their signatures:
<tools>
{tools}
</tools>
To call functions, answer with one call for each and nothing else, in this form:
{example}"""
EXAMPLE = (("FUNCTION", '{"ARGUMENT": "VALUE"}'),)
RESULT = "<tool_response>\n{result}\n</tool_response>"
MAX_DEPTH = 128  # of functions and arguments, which are walked recursively
PROBE_ARGUMENTS = '{"a": "b"}'


class ChatTools:
    """The way of one base. Immutable."""

    def __init__(self, template: str, named: str = "auto", *, takes_system: bool = True) -> None:
        """`template`: its source. `named`: a name of TOOL_FORMATS, or auto. Raises StartupError.

        `takes_system`: the template takes a system message; else the first message describes the functions.
        """
        if named != "auto" and named not in TOOL_FORMATS:
            raise StartupError(f"tool_format must be auto or one of {', '.join(TOOL_FORMATS)}, not {named}.")
        found = format_of(template) if named == "auto" else TOOL_FORMATS[named]
        self.format: ToolFormat = found or HERMES
        self.native = found is not None and "tools" in template
        self._takes_system = takes_system
        self._text_arguments = False  # some templates concatenate arguments as text

    def take_text_arguments(self) -> None:
        """The template fails on arguments that are objects."""
        self._text_arguments = True

    def prepared(
        self, messages: list[ChatMessage], tools: list[dict[str, Any]]
    ) -> tuple[list[ChatMessage], list[dict[str, Any]] | None]:
        """Messages and tools for the template; none if the messages describe them."""
        if self.native:
            return [self._native(message) for message in messages], tools or None
        written = self._written(messages)
        return (self._described(written, tools) if tools else written), None

    def _native(self, message: ChatMessage) -> ChatMessage:
        if calls := message.get("tool_calls"):
            return message | {"tool_calls": [self._call(call) for call in calls]}
        if "tool_call_id" in message:
            return message | {"tool_call_id": self._id(message["tool_call_id"])}
        return message

    def _call(self, call: dict[str, str]) -> dict[str, Any]:
        arguments: Any = call["arguments"]
        if not self._text_arguments:
            arguments = _object(arguments)
        function = {"name": call["name"], "arguments": arguments}
        return {"id": self._id(call["id"]), "type": "function", "function": function}

    def _id(self, id_: str) -> str:
        """An id that the template takes, the same for a call and its result."""
        wanted = self.format.id_chars
        if wanted is None or (len(id_) == wanted and id_.isascii() and id_.isalnum()):
            return id_
        return hashlib.sha256(id_.encode()).hexdigest()[:wanted]

    def _written(self, messages: list[ChatMessage]) -> list[ChatMessage]:
        """`messages` with calls and results as texts; results that follow each other share a message."""
        written: list[ChatMessage] = []
        previous = ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "tool":
                role, content = "user", RESULT.format(result=content)
                if previous == "tool":
                    content = f"{written.pop()['content']}\n{content}"
            elif calls := message.get("tool_calls"):
                text = self.format.write([(call["name"], call["arguments"]) for call in calls])
                content = f"{content}\n{text}" if content else text
            written.append({"role": role, "content": content})
            previous = message["role"]
        return written

    def _described(self, messages: list[ChatMessage], tools: list[dict[str, Any]]) -> list[ChatMessage]:
        """`messages` with the functions in the system message, or in the first one."""
        signatures = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = PREAMBLE.format(tools=signatures, example=self.format.write(EXAMPLE))
        first, rest = messages[0], messages[1:]
        if first["role"] == "system":
            text = f"{first['content']}\n\n{text}"
        elif self._takes_system:
            rest = messages
        else:
            return [first | {"content": f"{text}\n\n{first['content']}"}, *rest]
        return [{"role": "system", "content": text}, *rest]


def probe(mark: str) -> list[ChatMessage]:
    """A chat with a call and its result, in which texts are `mark`."""
    call = {"id": "callid123", "name": mark, "arguments": PROBE_ARGUMENTS}
    return [
        {"role": "user", "content": mark},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": mark, "tool_call_id": call["id"], "name": mark},
        {"role": "assistant", "content": mark},
    ]


def tools_chars(messages: list[ChatMessage], tools: list[dict[str, Any]]) -> int:
    """About the characters of functions and calls in a prompt."""
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    own = sum(len(call["name"]) + len(call["arguments"]) for call in calls)
    return own + (len(json.dumps(tools, ensure_ascii=False)) if tools else 0)


def _object(arguments: str) -> Any:
    """The arguments as an object; the text itself if it is none, as a model may have written it."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and not is_deeper(value, MAX_DEPTH) else arguments
