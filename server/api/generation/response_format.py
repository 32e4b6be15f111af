"""Checks response_format and functions: what the answer must match, as a grammar for the engine.

A schema is untrusted: it is bounded in size, and compiled once here under a limit of work, so that the engine
gets none that does not compile. llguidance matches patterns in linear time; those that need more, such as
back-references, do not compile.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from anyio import fail_after
from anyio.to_thread import run_sync
from llguidance import LLMatcher, LLParserLimits

from server.api.generation.chat_bodies import ResponseFormat
from server.api.http.body_model import at_most
from server.api.tools.grammar import arguments_schema, calls_grammar
from server.api.tools.tool_use import ToolUse
from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidField, shown

MAX_SCHEMA_CHARS = 65_536
ANY_OBJECT = '{"type":"object"}'
COMPILE_SECONDS = 1.0  # of all schemas of a request
INVALID_PARAMETERS = "invalid_function_parameters"  # OpenAI's code
_TOO_LONG = f"took over {COMPILE_SECONDS:g} s to compile"
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


async def grammar_for(
    response_format: ResponseFormat | None, use: ToolUse | None, tokenizer: Tokenizer
) -> str | None:
    """The text for Sampling.grammar; None if the answer may be any. Raises InvalidField."""
    answer = await _schema_of(response_format)
    if use is None or not (use.constrained or answer):
        return answer
    exact = [function for function in use.callable if use.exact(function)]
    paths = [f"{use.path(function)}.parameters" for function in exact]
    checks = [
        _Check(_schema_error, _text(arguments_schema(function), path, path), path, path, INVALID_PARAMETERS)
        for function, path in zip(exact, paths, strict=True)
    ]
    grammar = calls_grammar(tokenizer, use, answer)
    await _compile([*checks, _Check(_grammar_error, grammar, use.place, use.place)])
    return grammar


async def _schema_of(response_format: ResponseFormat | None) -> str | None:
    """The JSON schema of an answer without calls."""
    place = "response_format"
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is not None:
        schema, what = response_format.json_schema.schema_, f"{place}: json_schema.schema"
    elif response_format.schema_ is not None:
        schema, what = {"type": "object"} | response_format.schema_, f"{place}: schema"
    else:
        return ANY_OBJECT
    text = _text(schema, what, place)
    await _compile([_Check(_schema_error, text, what, place)])
    return text


@dataclass(frozen=True)
class _Check:
    """A text to compile. `what` names it in the sentence of InvalidField."""

    error_of: Callable[[str], str]
    text: str
    what: str
    param: str
    code: str | None = None

    def refusal(self, reason: str) -> InvalidField:
        return InvalidField(f"{self.what} {reason}.", param=self.param, code=self.code)


def _text(schema: dict[str, Any], what: str, param: str) -> str:
    """The schema as text. `what` names it in the sentences of InvalidField, which this raises."""
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=True)
    except (ValueError, RecursionError):
        reason = "holds a number that is not finite, or is nested too deeply"
        raise InvalidField(f"{what} {reason}.", param=param) from None
    at_most("the number of characters of the schema", len(text), MAX_SCHEMA_CHARS, param)
    if unsupported := _UNSUPPORTED & set(_keywords(schema)):
        raise InvalidField(f"{what} uses {min(unsupported)}, which is not supported.", param=param)
    return text


async def _compile(checks: list[_Check]) -> None:
    """Raise InvalidField for the first text that does not compile within the limits of work and time."""
    try:
        with fail_after(COMPILE_SECONDS):
            refusal = await run_sync(_first_refusal, checks, abandon_on_cancel=True)
    except TimeoutError:
        refusal = checks[-1].refusal(_TOO_LONG)
    if refusal:
        raise refusal


def _first_refusal(checks: list[_Check]) -> InvalidField | None:
    end = time.monotonic() + COMPILE_SECONDS  # nobody waits any longer
    for check in checks:
        if problem := check.error_of(check.text):
            return check.refusal(f"cannot be used: {shown(problem, 200)}")
        if time.monotonic() > end:
            return check.refusal(_TOO_LONG)
    return None


def _schema_error(schema: str) -> str:
    """The first error of the schema; "" if there is none."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        return str(error)
    return _grammar_error(grammar)


def _grammar_error(grammar: str) -> str:
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return messages[0] if failed and messages else ""


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
