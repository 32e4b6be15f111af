"""Bodies of the generation routes: OpenAI's fields, vLLM's extras, and by name those that are not supported.

A sampling parameter is a field of SamplingBody here; engine_requests.py copies it into the engine's Sampling.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import FailFast, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from server.api.http.body_model import Body, Metadata, at_most, caps
from server.api.structured_output.structured_outputs import StructuredBody
from server.errors import InvalidField, shown
from server.messages import Priority

INT32 = 2**31 - 1
INT64 = 2**63 - 1

Count = Annotated[int, Field(ge=1, le=INT32)]
Tokens = Annotated[list[int], FailFast()]
Texts = Annotated[list[str], FailFast()]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in each chunk, with include_usage
    include_obfuscation: Literal[False] = False  # events are not padded


_NO_TENSORS = "a prompt is text or token ids"
_NO_TEMPLATE = "the operator's chat template is the only one"
CHANGES_OUTPUT = "this server has no such mode"


class AdapterUse(Body):
    """One of several adapters in a request."""

    name: Annotated[str, Field(min_length=1, max_length=512)]  # or name@version, name@alias
    weight: Annotated[float, Field(ge=-16, le=16)] = 1.0


class CacheOptions(Body):
    mode: Literal["implicit"] = "implicit"  # prompts are cached without being told where
    ttl: Annotated[str, Field(max_length=16)] | None = None


class SamplingBody(StructuredBody):
    """The fields that completions and chat completions share."""

    refused: ClassVar[dict[str, str]] = StructuredBody.refused | {
        "prompt_embeds": _NO_TENSORS,
        "chat_template": _NO_TEMPLATE,
        "chat_template_kwargs": _NO_TEMPLATE,
        "moderation": CHANGES_OUTPUT,
    }

    model: Annotated[str, Field(min_length=1, max_length=512)]
    adapters: list[AdapterUse] | None = None  # several at once, on the base that `model` names
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] = 0
    n: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0  # 0: the likeliest token
    top_k: Annotated[int, Field(ge=-1, le=INT32)] = 0  # 0 and -1: all
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    stop: Texts = Field(default_factory=list)
    stop_token_ids: Tokens = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    bad_words: Texts = Field(default_factory=list)
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=INT32)] | None = None  # -1: to what fits
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    # the priority class, see priority.py
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    priority: Priority | Annotated[int, Field(ge=-INT32, le=INT32)] | None = None
    # taken and without effect: they change no output
    user: str | None = None
    metadata: Metadata | None = None
    store: bool = False  # nothing is kept
    request_id: Annotated[str, Field(max_length=512)] | None = None
    spaces_between_special_tokens: Literal[True] = True
    length_penalty: Annotated[float, Field(ge=1, le=1)] = 1.0
    use_beam_search: Literal[False] = False
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: CacheOptions | None = None

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapters(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list):
            at_most("the number of adapters", len(value), caps(info).max_stack, "adapters")
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

    @field_validator("prompt_logprobs")
    @classmethod
    def _prompt_logprobs(cls, value: int, info: ValidationInfo) -> int:
        at_most("prompt_logprobs", value, caps(info).max_top_logprobs)
        return value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_token_ids(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list):
            at_most("the number of stop_token_ids", len(value), caps(info).max_stop, "stop_token_ids")
        return value

    @field_validator("bad_words", mode="before")
    @classmethod
    def _bad_words(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list):
            at_most("the number of bad_words", len(value), caps(info).max_stop, "bad_words")
            for word in value:
                if not isinstance(word, str) or not word:
                    raise InvalidField(f"bad_words must be texts, not {shown(word)}.", param="bad_words")
                at_most(
                    "the number of characters of a bad word",
                    len(word),
                    caps(info).max_stop_chars,
                    "bad_words",
                )
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _truncate_prompt_tokens(cls, value: int | None) -> int | None:
        if value == 0:
            raise InvalidField(
                "truncate_prompt_tokens must be at least 1, or -1, not 0.", param="truncate_prompt_tokens"
            )
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _logit_bias(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, dict):
            at_most("the number of logit_bias entries", len(value), caps(info).max_logit_bias, "logit_bias")
        return value

    @model_validator(mode="after")
    def _stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidField("stream_options needs stream to be true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidField("prompt_logprobs needs stream to be false.", param="prompt_logprobs")
        return self


PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer"}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1}},
    ]
}


class CompletionBody(SamplingBody):
    """The body of completions."""

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)] = None  # see prompts.py
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None  # 0: the prompt alone
    add_special_tokens: bool = True  # those that the tokenizer puts before a text
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Count | None = None

    @field_validator("logprobs")
    @classmethod
    def _logprobs(cls, value: int, info: ValidationInfo) -> int:
        at_most("logprobs", value, caps(info).max_top_logprobs)
        return value

    @field_validator("suffix")
    @classmethod
    def _suffix(cls, value: str) -> str:
        if value:
            raise InvalidField(
                "suffix is not supported: the base models served here do not insert.", param="suffix"
            )
        return value

    @field_validator("best_of")
    @classmethod
    def _best_of(cls, value: int, info: ValidationInfo) -> int:
        at_most("best_of", value, caps(info).max_n)
        return value

    @model_validator(mode="after")
    def _combinations(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidField(
                f"best_of must be at least n, which is {self.n}, not {self.best_of}.", param="best_of"
            )
        if self.stream and self.best_of not in {None, self.n}:
            raise InvalidField("best_of over n cannot go with stream.", param="best_of")
        return self
