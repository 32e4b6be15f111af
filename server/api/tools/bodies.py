"""Functions in the body of chat completions: definitions, the choice among them, calls of earlier turns."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.api.http.body_model import Body, at_most_entries
from server.errors import InvalidField, shown

MAX_TOOLS = 128  # OpenAI's
MAX_NAME_CHARS = 128
NAME = Field(min_length=1, max_length=MAX_NAME_CHARS, pattern=r"^[a-zA-Z0-9_-]+$")
FunctionName = Annotated[str, NAME]


class FunctionDefinition(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of the arguments; None: it has none
    strict: bool | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """As the model is told of it."""
        described = {"description": self.description} if self.description is not None else {}
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"name": self.name, **described, "parameters": parameters}


class NamedFunction(Body):
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)]


def _function_type(value: Any) -> Any:
    """Refuse what has another type than function, by that type."""
    if isinstance(value, dict) and value.get("type") == "custom":
        raise InvalidField("Tools of type custom are not supported; use functions.", param="tools")
    return value


class FunctionTool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1), BeforeValidator(at_most_entries(MAX_TOOLS))]


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class FunctionCall(Body):
    """A call of an earlier turn. `arguments`: JSON, or whatever the model wrote."""

    name: FunctionName
    arguments: str
    parsed_arguments: Any = None  # what a client's helper made of them, sent back with the call


class ToolCall(Body):
    id: Annotated[str, Field(min_length=1, max_length=512)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # of a streamed call that was sent back as it came


def _choice(value: Any) -> Any:
    """The choice as one of its models, so that an error names its own field."""
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise InvalidField(
            f"tool_choice must be none, auto, required or a function, not {shown(value)}.",
            param="tool_choice",
        )
    if isinstance(value, dict):
        model = AllowedToolsChoice if value.get("type") == "allowed_tools" else NamedTool
        return model.model_validate(_function_type(value))
    return value


Tool = Annotated[FunctionTool, BeforeValidator(_function_type)]
Tools = Annotated[list[Tool], BeforeValidator(at_most_entries(MAX_TOOLS))]
Functions = Annotated[
    list[FunctionDefinition], Field(min_length=1), BeforeValidator(at_most_entries(MAX_TOOLS))
]
ToolCalls = Annotated[list[ToolCall], BeforeValidator(at_most_entries(MAX_TOOLS))]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice, BeforeValidator(_choice)
]
FunctionChoice = Literal["none", "auto"] | NamedFunction
