"""Bodies of the generation routes: OpenAI's fields, vLLM's extras, and by name what we do not do.

Strict: no "5" for 5, no unknown field. A null counts as absent. The operator's caps come with the
validation context, a Settings.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationInfo, field_validator, model_validator

from server.errors import InvalidField, shown
from server.settings import Settings

INT32 = 2**31 - 1
INT64 = 2**63 - 1

Count = Annotated[int, Field(ge=1, le=INT32)]
Tokens = Annotated[list[int], FailFast()]
Texts = Annotated[list[str], FailFast()]


class Body(BaseModel):
    """An object of a request. `refused` names fields we know and turn down, with the reason."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        """Stop at the first unknown name; pydantic would list a million of them."""
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for name in given:
            if name in cls.refused:
                raise InvalidField(f"{name} is not supported: {cls.refused[name]}.", param=name)
            if name not in cls.model_fields:
                raise InvalidField(f"{shown(name)} is not a field of this request.", code="unknown_field")
        return given


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: without it a stream is what it is here


_NO_TENSORS = "a prompt is text or token ids"
_NO_TEMPLATE = "the operator's chat template is the only one"
_CHANGES_OUTPUT = "this server has no such mode"


class AdapterUse(Body):
    """One of several adapters in a request."""

    name: Annotated[str, Field(min_length=1, max_length=512)]  # or name@version, name@alias
    weight: Annotated[float, Field(ge=-16, le=16)] = 1.0


class SamplingBody(Body):
    """What completions and chat completions share."""

    refused: ClassVar[dict[str, str]] = {
        "prompt_embeds": _NO_TENSORS,
        "chat_template": _NO_TEMPLATE,
        "chat_template_kwargs": _NO_TEMPLATE,
        "moderation": _CHANGES_OUTPUT,
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    adapters: list[AdapterUse] | None = None  # several at once, on the base that `model` names
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] = 0
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=INT32)] = 0  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Texts = []
    stop_token_ids: Tokens = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    # taken and without effect: they change no output
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @field_validator("adapters")
    @classmethod
    def _adapters(cls, value: list[AdapterUse] | None, info: ValidationInfo) -> list[AdapterUse] | None:
        at_most("the number of adapters", len(value or ()), caps(info).max_stack, "adapters")
        return value

    @field_validator("n")
    @classmethod
    def _n(cls, value: int, info: ValidationInfo) -> int:
        at_most("n", value, caps(info).max_n)
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any, info: ValidationInfo) -> list[str]:
        stops = value if isinstance(value, list) else [value]
        at_most("the number of strings in stop", len(stops), caps(info).max_stop, "stop")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InvalidField(f"stop must be one or several texts, not {shown(stop)}.", param="stop")
            at_most("the number of characters of a stop", len(stop), caps(info).max_stop_chars, "stop")
        return stops

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_token_ids(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list):
            at_most("the number of stop_token_ids", len(value), caps(info).max_stop, "stop_token_ids")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _logit_bias(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, dict):
            at_most("the number of logit_bias entries", len(value), caps(info).max_logit_bias, "logit_bias")
        return value


class CompletionBody(SamplingBody):
    refused: ClassVar[dict[str, str]] = SamplingBody.refused | {
        "suffix": "the base models served here do not insert"
    }

    prompt: Any = None  # str, [str], [int] or [[int]]: see prompts.py
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Count | None = None

    @field_validator("logprobs")
    @classmethod
    def _logprobs(cls, value: int, info: ValidationInfo) -> int:
        at_most("logprobs", value, caps(info).max_top_logprobs)
        return value

    @model_validator(mode="after")
    def _combinations(self) -> "CompletionBody":
        if self.best_of not in {None, self.n}:
            raise InvalidField(
                f"best_of must equal n, which is {self.n}, not {self.best_of}.", param="best_of"
            )
        if self.echo and self.logprobs is not None:
            raise InvalidField("echo gives the prompt's text only: it cannot go with logprobs.", param="echo")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("tool_calls", "tool_call_id", "function_call", "audio"),
        "this server calls no tools and hears no audio",
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # not shown to the model: its template has no place for it
    refusal: str | None = None
    annotations: list[Any] | None = None  # what an SDK sends back with an earlier answer

    @field_validator("content", mode="before")
    @classmethod
    def _content(cls, value: Any) -> Any:
        parts = value if isinstance(value, list) else []
        other = next((p for p in parts if not isinstance(p, dict) or p.get("type") != "text"), None)
        if other is not None or not isinstance(value, str | list):
            raise InvalidField("content must be text, or parts of type text.", param="messages")
        return value

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class ChatBody(SamplingBody):
    refused: ClassVar[dict[str, str]] = SamplingBody.refused | dict.fromkeys(
        (
            "tools",
            "functions",
            "function_call",
            "audio",
            "prediction",
            "web_search_options",
            "reasoning_effort",
            "verbosity",
        ),
        _CHANGES_OUTPUT,
    )

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: dict[str, Any] | None = None  # see grammar.py
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs(cls, value: int, info: ValidationInfo) -> int:
        at_most("top_logprobs", value, caps(info).max_top_logprobs)
        return value

    @model_validator(mode="after")
    def _combinations(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidField("top_logprobs needs logprobs to be true.", param="top_logprobs")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidField(
                "max_tokens and max_completion_tokens differ; send one of them.",
                param="max_completion_tokens",
            )
        return self


def caps(info: ValidationInfo) -> Settings:
    if not isinstance(info.context, Settings):
        raise TypeError("these bodies are validated with a Settings as their context")
    return info.context


def at_most(what: str, value: int, limit: int, param: str | None = None) -> None:
    if value > limit:
        raise InvalidField(f"{what} must be at most {limit}, not {shown(value)}.", param=param or what)
