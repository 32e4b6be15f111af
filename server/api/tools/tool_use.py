"""Which functions a request offers, which of them may or must be called, and in which of OpenAI's two shapes.

The newer shape is `tools`, `tool_choice` and `tool_calls`; the deprecated one is `functions`, `function_call`
and one call at a time.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from server.api.http.body_model import at_most
from server.api.tools.bodies import (
    AllowedToolsChoice,
    FunctionDefinition,
    FunctionTool,
    NamedFunction,
    NamedTool,
)
from server.errors import InvalidField, InvalidRequest, shown

MAX_TOOLS_CHARS = 262_144  # of all definitions, as JSON
Mode = Literal["auto", "required", "named"]


class _Body(Protocol):
    """The fields of a chat body that are read here."""

    @property
    def tools(self) -> list[FunctionTool] | None: ...
    @property
    def tool_choice(self) -> Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None: ...
    @property
    def parallel_tool_calls(self) -> bool | None: ...
    @property
    def functions(self) -> list[FunctionDefinition] | None: ...
    @property
    def function_call(self) -> Literal["none", "auto"] | NamedFunction | None: ...


@dataclass(frozen=True)
class ToolUse:
    """The functions of a request whose answer may have calls."""

    functions: list[FunctionDefinition]  # all that the model is told of
    callable: list[FunctionDefinition]  # those that it may call; at least one
    mode: Mode  # named: the only callable one must be called
    parallel: bool  # an answer may have several calls
    deprecated: bool  # the shape of `functions`
    place: str  # of the definitions, for messages: tools or functions

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The functions as the chat template gets them."""
        return [{"type": "function", "function": function.shown} for function in self.functions]

    @property
    def constrained(self) -> bool:
        """Calls are held to their schemas while they are generated."""
        return self.mode != "auto" or any(function.strict for function in self.callable)

    def exact(self, function: FunctionDefinition) -> bool:
        """Calls of `function` have to match its schema; those of another have any object as arguments."""
        return self.mode != "auto" or bool(function.strict)

    def path(self, function: FunctionDefinition) -> str:
        """The field with the definition of `function`."""
        index = self.functions.index(function)
        return f"{self.place}[{index}]" + ("" if self.deprecated else ".function")


def tool_use(body: _Body) -> ToolUse | None:
    """The functions of `body`; None if there are none, or if none may be called. Raises InvalidRequest."""
    if body.functions is not None:
        return _deprecated(body, body.functions)
    if isinstance(body.function_call, NamedFunction):
        raise InvalidRequest("function_call needs functions.", param="function_call")
    functions = [tool.function for tool in body.tools or []]
    choice = body.tool_choice
    if not functions:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(
                "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
                param="tool_choice",
            )
        return None
    _check(functions, "tools")
    if choice == "none":
        return None
    mode: Mode = "auto"
    may = functions
    if isinstance(choice, NamedTool):
        mode, may = "named", _named(functions, [choice.function.name], "tool_choice")
    elif isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        names = [tool.function.name for tool in allowed.tools]
        mode, may = allowed.mode, _named(functions, names, "tool_choice")
    elif choice == "required":
        mode = "required"
    parallel = body.parallel_tool_calls is not False and mode != "named"
    return ToolUse(functions, may, mode, parallel, deprecated=False, place="tools")


def _deprecated(body: _Body, functions: list[FunctionDefinition]) -> ToolUse | None:
    if body.tools is not None or body.tool_choice is not None:
        raise InvalidRequest("functions cannot go with tools or tool_choice.", param="functions")
    _check(functions, "functions")
    choice = body.function_call
    if choice == "none":
        return None
    if isinstance(choice, NamedFunction):
        may = _named(functions, [choice.name], "function_call")
        return ToolUse(functions, may, "named", parallel=False, deprecated=True, place="functions")
    return ToolUse(functions, functions, "auto", parallel=False, deprecated=True, place="functions")


def _check(functions: list[FunctionDefinition], place: str) -> None:
    """Raise InvalidField for names given twice, arguments that are no object, and too much text."""
    names = set[str]()
    for i, function in enumerate(functions):
        if function.name in names:
            raise InvalidField(f"{place} has two functions called {shown(function.name)}.", param=place)
        names.add(function.name)
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            raise InvalidField(
                f"{place}[{i}]: the parameters of a function must have the type object, not {shown(kind)}.",
                param=place,
                code="invalid_function_parameters",
            )
    try:
        text = json.dumps([function.shown for function in functions], allow_nan=False)
    except ValueError:
        raise InvalidField(f"{place} holds a number that is not finite.", param=place) from None
    at_most(f"the number of characters of {place}", len(text), MAX_TOOLS_CHARS, place)


def _named(functions: list[FunctionDefinition], names: list[str], param: str) -> list[FunctionDefinition]:
    """The functions of these names. Raises InvalidRequest for one that is not defined."""
    by_name = {function.name: function for function in functions}
    for name in names:
        if name not in by_name:
            raise InvalidRequest(
                f"{param} names the function {shown(name)}, which is not defined.", param=param
            )
    return [by_name[name] for name in dict.fromkeys(names)]
