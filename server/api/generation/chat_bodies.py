"""The body of chat completions: messages and response_format, beside the fields of SamplingBody."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, ValidationInfo, field_validator, model_validator

from server.api.generation.bodies import CHANGES_OUTPUT, Count, SamplingBody
from server.api.http.body_model import Body, at_most, at_most_entries, caps
from server.api.structured_output.structured_outputs import ResponseFormat
from server.api.tools.bodies import FunctionCall, FunctionChoice, Functions, ToolCalls, ToolChoice, Tools
from server.errors import InvalidField

MAX_ANNOTATIONS = 256


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """A part of an earlier answer in which the assistant declined."""

    type: Literal["refusal"]
    refusal: str


Content = str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]


class UrlCitation(Body):
    start_index: int
    end_index: int
    title: str
    url: str


class Annotation(Body):
    """An annotation of an earlier answer that an SDK sends back; not shown to the model."""

    type: Literal["url_citation"]
    url_citation: UrlCitation


class Message(Body):
    """A message of the conversation: text, an assistant's calls, or the result of one."""

    refused: ClassVar[dict[str, str]] = {"audio": "this server hears no audio"}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None  # tools/conversation.py checks what each role needs
    name: str | None = None  # not shown to the model: its template does not use it
    tool_calls: ToolCalls | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    # of an earlier answer that a client sends back: not shown to the model
    annotations: Annotated[list[Annotation], BeforeValidator(at_most_entries(MAX_ANNOTATIONS))] | None = None
    parsed: Any = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    provider_specific_fields: dict[str, Any] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _content(cls, value: Any) -> Any:
        parts = value if isinstance(value, list) else []
        known = all(isinstance(p, dict) and p.get("type") in ("text", "refusal") for p in parts)
        if not known or not isinstance(value, str | list):
            raise InvalidField("content must be text, or parts of type text.", param="messages")
        return value

    @property
    def text(self) -> str:
        """What the model is shown: of an answer that declined, the refusal."""
        if isinstance(self.content, list):
            return "".join(p.text if isinstance(p, TextPart) else p.refusal for p in self.content)
        return self.content or self.refusal or ""


class ChatBody(SamplingBody):
    """The body of chat completions."""

    refused: ClassVar[dict[str, str]] = SamplingBody.refused | dict.fromkeys(
        ("audio", "prediction", "web_search_options"), CHANGES_OUTPUT
    )

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]  # _messages checks the cap
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None  # what is done with these five: server/api/tools/
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Functions | None = None
    function_call: FunctionChoice | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    # taken and without effect: hints for models that reason, and modes that are off
    reasoning_effort: Annotated[str, Field(max_length=16)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    add_special_tokens: Literal[False] = False
    echo: Literal[False] = False
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _messages(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list):
            contents = [m.get("content") for m in value if isinstance(m, dict)]
            parts = sum(len(content) for content in contents if isinstance(content, list))
            at_most(
                "the number of messages and their parts",
                len(value) + parts,
                caps(info).max_messages,
                "messages",
            )
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs(cls, value: int, info: ValidationInfo) -> int:
        at_most("top_logprobs", value, caps(info).max_top_logprobs)
        return value

    @model_validator(mode="after")
    def _combinations(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise InvalidField("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if self.structure and self.response_format and self.response_format.type != "text":
            raise InvalidField(
                "Send response_format or structured_outputs, not both.", param="response_format"
            )
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidField(
                "max_tokens and max_completion_tokens differ; send one of them.",
                param="max_completion_tokens",
            )
        return self
