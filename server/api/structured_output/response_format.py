"""Checks response_format: the JSON schema that the answer must match, as text for the engine.

A schema is untrusted: it is bounded in size, and compiled once here under a limit of work, so that the engine
gets none that does not compile. llguidance matches patterns in linear time; those that need more, such as
back-references, do not compile.
"""

import json
from typing import Any

from anyio import fail_after
from anyio.to_thread import run_sync
from llguidance import LLMatcher, LLParserLimits

from server.api.http.body_model import at_most
from server.api.structured_output.schema_keywords import keywords, without_annotations
from server.api.structured_output.structured_outputs import ResponseFormat
from server.errors import InvalidField, shown

MAX_SCHEMA_CHARS = 65_536
ANY_OBJECT = '{"type":"object"}'
COMPILE_SECONDS = 1.0
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
_UNSUPPORTED = frozenset({"x-guidance"})  # llguidance's own: would change how it reads the schema


async def grammar_for(response_format: ResponseFormat | None) -> str | None:
    """The schema text for Sampling.grammar; None for plain text. Raises InvalidField."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is not None:
        return await _checked(response_format.json_schema.schema_, "json_schema.schema")
    if response_format.schema_ is not None:
        return await _checked({"type": "object"} | response_format.schema_, "schema")
    return ANY_OBJECT


async def _checked(schema: dict[str, Any], place: str) -> str:
    """The schema as text. `place` names it in the sentences of InvalidField, which this raises."""
    try:
        text = json.dumps(without_annotations(schema), allow_nan=False, ensure_ascii=True)
    except (ValueError, RecursionError):
        raise _invalid(f"{place} holds a number that is not finite, or is nested too deeply") from None
    at_most("the number of characters of the schema", len(text), MAX_SCHEMA_CHARS, "response_format")
    if unsupported := _UNSUPPORTED & set(keywords(schema)):
        raise _invalid(f"{place} uses {min(unsupported)}, which is not supported")
    try:
        with fail_after(COMPILE_SECONDS):
            problem = await run_sync(_compile, text, abandon_on_cancel=True)
    except TimeoutError:
        raise _invalid(f"{place} took over {COMPILE_SECONDS:g} s to compile") from None
    if problem:
        raise _invalid(f"{place} cannot be used: {shown(problem, 200)}")
    return text


def _compile(schema: str) -> str:
    """The first error of the schema; "" if there is none."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema)
    except ValueError as error:
        return str(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return messages[0] if failed and messages else ""


def _invalid(what: str) -> InvalidField:
    return InvalidField(f"response_format: {what}.", param="response_format")
