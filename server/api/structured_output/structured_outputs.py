"""What an answer must match: OpenAI's `response_format`, vLLM's `structured_outputs` and its `guided_...`.

structured_grammar.py makes a grammar of it.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from server.api.http.body_model import Body
from server.errors import InvalidField

GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
_NO_GRAMMAR = "a grammar's language differs between servers; send json, regex or choice"
_NO_WHITESPACE = "the white space between JSON tokens is bounded by the server"


class SchemaHolder(Body):
    """`json_schema` of a response_format. The schema is enforced with `strict: false` too."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]  # see response_format.py
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must look like; response_format.py turns it into a grammar."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None  # llama.cpp's, of a json_object
    json_schema: SchemaHolder | None = None

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        place = "response_format"
        if self.schema_ is not None and self.type != "json_object":
            raise InvalidField(f"{place}.schema needs the type json_object, not {self.type}.", param=place)
        if self.json_schema is not None and self.type != "json_schema":
            raise InvalidField(
                f"{place}.json_schema needs the type json_schema, not {self.type}.", param=place
            )
        if self.json_schema is None and self.type == "json_schema":
            raise InvalidField(f"{place}.json_schema is required.", param=place, code="missing_field")
        return self


class StructuredOutputs(Body):
    """One of these, which the answer must match as a whole."""

    refused: ClassVar[dict[str, str]] = {
        "grammar": _NO_GRAMMAR,
        "structural_tag": _NO_GRAMMAR,
        "whitespace_pattern": _NO_WHITESPACE,
    }

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None  # a schema, perhaps as text
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    json_object: bool = False
    disable_fallback: bool = False  # there is none
    disable_any_whitespace: Literal[False] = False
    disable_additional_properties: Literal[False] = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [self.json_ is not None, self.regex is not None, self.choice is not None, self.json_object]
        if sum(given) != 1:
            raise InvalidField(
                f"structured_outputs takes one of json, regex, choice and json_object, not {sum(given)}.",
                param="structured_outputs",
            )
        return self


class StructuredBody(Body):
    """The fields of a request that say so."""

    refused: ClassVar[dict[str, str]] = {
        "guided_grammar": _NO_GRAMMAR,
        "guided_whitespace_pattern": _NO_WHITESPACE,
    }

    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_decoding_backend: Annotated[str, Field(max_length=64)] | None = None  # taken and without effect

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        guided = [name for name in GUIDED if getattr(self, name) is not None]
        if len(guided) + (self.structured_outputs is not None) > 1:
            name = guided[-1]
            raise InvalidField(f"{name} cannot go with another structure of the answer.", param=name)
        return self

    @property
    def structure(self) -> StructuredOutputs | None:
        """`structured_outputs`, also under its older names."""
        guided = {GUIDED[name]: getattr(self, name) for name in GUIDED if getattr(self, name) is not None}
        return StructuredOutputs.model_validate(guided) if guided else self.structured_outputs
