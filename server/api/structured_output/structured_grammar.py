"""Makes a grammar for the engine of `structured_outputs`; response_format.py does so of response_format.

A regular expression is untrusted like a schema: llguidance matches it in linear time, it is compiled here
once under the same limits of work, and one that needs more, such as a back-reference, does not compile.
"""

import json
from typing import Any

from anyio import fail_after
from anyio.to_thread import run_sync
from llguidance import LLMatcher

from server.api.http.body_model import at_most
from server.api.structured_output.response_format import (
    ANY_OBJECT,
    COMPILE_SECONDS,
    LIMITS,
    MAX_SCHEMA_CHARS,
    grammar_for,
)
from server.api.structured_output.structured_outputs import ResponseFormat, SchemaHolder, StructuredOutputs
from server.errors import InvalidField, shown
from server.json_reader import JsonError, read_json
from server.messages import GRAMMAR_HEADER

PLACE = "structured_outputs"


async def structured_grammar(structure: StructuredOutputs | None) -> str | None:
    """The text for Sampling.grammar; None if the answer may be anything. Raises InvalidField."""
    if structure is None:
        return None
    if structure.json_ is not None:
        return await _schema_grammar(_parsed(structure.json_))
    if structure.regex is not None:
        _check_length("regex", structure.regex)
        wrapped = json.loads(LLMatcher.grammar_from_regex(structure.regex))
        return await _compiled("regex", wrapped["grammars"][0]["lark_grammar"])
    if structure.choice is not None:
        return await _compiled("choice", "start: " + " | ".join(map(json.dumps, structure.choice)))
    return ANY_OBJECT


async def _schema_grammar(schema: dict[str, Any]) -> str | None:
    holder = SchemaHolder.model_construct(schema_=schema)
    try:
        return await grammar_for(ResponseFormat.model_construct(type="json_schema", json_schema=holder))
    except InvalidField as error:
        raise _refusal(error.message.removeprefix("response_format: json_schema.schema ")) from None


def _parsed(schema: dict[str, Any] | str) -> dict[str, Any]:
    """A schema that may have come as text. Raises InvalidField."""
    if isinstance(schema, dict):
        return schema
    _check_length("json", schema)
    try:
        value = read_json(schema.encode())
    except JsonError as error:
        raise _refusal(f"json {error.reason}.") from None
    if not isinstance(value, dict):
        raise _refusal("json must be an object.")
    return value


async def _compiled(part: str, lark: str) -> str:
    """The grammar, once it is known to compile. Raises InvalidField."""
    _check_length(part, lark)
    grammar = f"{GRAMMAR_HEADER}\n{lark}"
    try:
        with fail_after(COMPILE_SECONDS):
            problem = await run_sync(_error, grammar, abandon_on_cancel=True)
    except TimeoutError:
        raise _refusal(f"{part} took over {COMPILE_SECONDS:g} s to compile.") from None
    if problem:
        raise _refusal(f"{part} cannot be used: {shown(problem, 200)}.")
    return grammar


def _error(grammar: str) -> str:
    """The first error of the grammar; "" if there is none."""
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    return messages[0] if failed and messages else ""


def _check_length(part: str, text: str) -> None:
    at_most(f"the number of characters of {part}", len(text), MAX_SCHEMA_CHARS, PLACE)


def _refusal(what: str) -> InvalidField:
    return InvalidField(f"{PLACE}: {what}", param=PLACE)
