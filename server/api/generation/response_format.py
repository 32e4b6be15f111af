"""Checks response_format and structured_outputs: what the answer must match, as a grammar for the engine.

A schema is untrusted, and so is a regular expression: it is bounded in size, and compiled once here under a
limit of work, so that the engine gets none that does not compile. llguidance matches patterns in linear time;
those that need more, such as back-references, do not compile.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anyio import fail_after
from anyio.to_thread import run_sync
from llguidance import LLMatcher, LLParserLimits

from server.api.generation.chat_bodies import ResponseFormat
from server.api.generation.structured_outputs import StructuredOutputs
from server.api.http.body_model import at_most
from server.errors import InvalidField, shown
from server.json_reader import JsonError, read_json

MAX_SCHEMA_CHARS = 65_536
ANY_OBJECT = '{"type":"object"}'
COMPILE_SECONDS = 1.0
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
# keywords whose objects have names as keys, and schemas as values
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA = frozenset({"enum", "const", "default", "examples"})  # keywords whose values are data
_UNSUPPORTED = frozenset({"x-guidance"})  # llguidance's own: would change how it reads the schema
# Formats that are enforced. Any other is an annotation, as JSON Schema says, and pydantic writes many.
FORMATS = frozenset(
    ["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
)


@dataclass(frozen=True)
class _Place:
    """Where the request has it, for the sentences of InvalidField."""

    field: str
    part: str

    def refusal(self, what: str) -> InvalidField:
        return InvalidField(f"{self.field}: {self.part} {what}.", param=self.field)


async def grammar_for(format_: ResponseFormat | None, structure: StructuredOutputs | None) -> str | None:
    """The text for Sampling.grammar; None if the answer may be anything. Raises InvalidField."""
    if structure is None:
        return await _format_grammar(format_)
    if format_ is not None and format_.type != "text":
        raise InvalidField("Send response_format or structured_outputs, not both.", param="response_format")
    return await _structure_grammar(structure)


async def _format_grammar(format_: ResponseFormat | None) -> str | None:
    if format_ is None or format_.type == "text":
        return None
    if format_.json_schema is not None:
        place = _Place("response_format", "json_schema.schema")
        return await _schema(format_.json_schema.schema_, place)
    if format_.schema_ is not None:
        return await _schema({"type": "object"} | format_.schema_, _Place("response_format", "schema"))
    return ANY_OBJECT


async def _structure_grammar(structure: StructuredOutputs) -> str:
    if structure.json_ is not None:
        place = _Place("structured_outputs", "json")
        return await _schema(_parsed(structure.json_, place), place)
    if structure.regex is not None:
        place = _Place("structured_outputs", "regex")
        _check_length(structure.regex, place)
        grammar = json.loads(LLMatcher.grammar_from_regex(structure.regex))
        return await _compiled(grammar["grammars"][0]["lark_grammar"], place)
    if structure.choice is not None:
        place = _Place("structured_outputs", "choice")
        return await _compiled("start: " + " | ".join(map(json.dumps, structure.choice)), place)
    return ANY_OBJECT


def _parsed(schema: dict[str, Any] | str, place: _Place) -> dict[str, Any]:
    """A schema that may have come as text. Raises InvalidField."""
    if isinstance(schema, dict):
        return schema
    _check_length(schema, place)
    try:
        value = read_json(schema.encode())
    except JsonError as error:
        raise place.refusal(error.reason) from None
    if not isinstance(value, dict):
        raise place.refusal("must be an object")
    return value


async def _schema(schema: dict[str, Any], place: _Place) -> str:
    """The schema as text, without formats that nobody enforces. Raises InvalidField."""
    try:
        text = json.dumps(_without_annotations(schema), allow_nan=False, ensure_ascii=True)
    except (ValueError, RecursionError):
        raise place.refusal("holds a number that is not finite, or is nested too deeply") from None
    if unsupported := _UNSUPPORTED & set(_keywords(schema)):
        raise place.refusal(f"uses {min(unsupported)}, which is not supported")
    return await _compiled(text, place)


async def _compiled(grammar: str, place: _Place) -> str:
    """`grammar`, once it is known to compile. Raises InvalidField."""
    _check_length(grammar, place)
    try:
        with fail_after(COMPILE_SECONDS):
            problem = await run_sync(_compile, grammar, abandon_on_cancel=True)
    except TimeoutError:
        raise place.refusal(f"took over {COMPILE_SECONDS:g} s to compile") from None
    if problem:
        raise place.refusal(f"cannot be used: {shown(problem, 200)}")
    return grammar


def _check_length(text: str, place: _Place) -> None:
    at_most(f"the number of characters of {place.part}", len(text), MAX_SCHEMA_CHARS, place.field)


def _compile(text: str) -> str:
    """The first error of a schema, or of a grammar; "" if there is none."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(text) if text.startswith("{") else text
    except ValueError as error:
        return str(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return messages[0] if failed and messages else ""


def _without_annotations(schema: Any, named: bool = False) -> Any:
    """`schema` without formats that nobody enforces; `named`: its keys are names, not keywords."""
    if isinstance(schema, list):
        return [_without_annotations(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if named:
        return {name: _without_annotations(value) for name, value in schema.items()}
    return {
        key: value if key in _DATA else _without_annotations(value, named=key in _NAMED_SCHEMAS)
        for key, value in schema.items()
        if key != "format" or value in FORMATS
    }


def _keywords(schema: Any) -> Iterator[str]:
    """Every key of the schema in the place of a keyword."""
    if isinstance(schema, list):
        for item in schema:
            yield from _keywords(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            if key in _NAMED_SCHEMAS and isinstance(value, dict):
                yield from _keywords(list(value.values()))
            elif key not in _DATA:
                yield from _keywords(value)
