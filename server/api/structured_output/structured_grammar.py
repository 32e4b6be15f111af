"""Makes a grammar for the engine of `structured_outputs`; response_format.py does so of response_format."""

import json
from typing import Any

from llguidance import LLMatcher

from server.api.http.body_model import at_most
from server.api.structured_output.compilation import MAX_SCHEMA_CHARS, Source, compile_all
from server.api.structured_output.response_format import ANY_OBJECT, compiled_schema
from server.api.structured_output.structured_outputs import StructuredOutputs
from server.json_reader import JsonError, read_json
from server.messages import GRAMMAR_HEADER

PLACE = "structured_outputs"


async def structured_grammar(structure: StructuredOutputs | None) -> str | None:
    """The text for Sampling.grammar; None if the answer may be anything. Raises InvalidField."""
    if structure is None:
        return None
    if structure.json_ is not None:
        return await compiled_schema(_parsed(structure.json_), _source("json"))
    if structure.regex is not None:
        _check_length("regex", structure.regex)
        wrapped = json.loads(LLMatcher.grammar_from_regex(structure.regex))
        return await _compiled("regex", wrapped["grammars"][0]["lark_grammar"])
    if structure.choice is not None:
        return await _compiled("choice", "start: " + " | ".join(map(json.dumps, structure.choice)))
    return ANY_OBJECT


def _parsed(schema: dict[str, Any] | str) -> dict[str, Any]:
    """A schema that may have come as text. Raises InvalidField."""
    if isinstance(schema, dict):
        return schema
    _check_length("json", schema)
    try:
        value = read_json(schema.encode())
    except JsonError as error:
        raise _source("json").refusal(error.reason) from None
    if not isinstance(value, dict):
        raise _source("json").refusal("must be an object")
    return value


async def _compiled(part: str, lark: str) -> str:
    """The grammar, once it is known to compile. Raises InvalidField."""
    _check_length(part, lark)
    grammar = f"{GRAMMAR_HEADER}\n{lark}"
    await compile_all([(grammar, _source(part))])
    return grammar


def _check_length(part: str, text: str) -> None:
    at_most(f"the number of characters of {part}", len(text), MAX_SCHEMA_CHARS, PLACE)


def _source(part: str) -> Source:
    return Source(f"{PLACE}: {part}", PLACE)
