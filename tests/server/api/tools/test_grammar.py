"""The grammar of an answer with calls takes what each format writes, and nothing that breaks a schema."""

import json
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from server.api.tools.bodies import FunctionDefinition
from server.api.tools.grammar import calls_grammar
from server.api.tools.tool_use import Mode, ToolUse
from server.base_model.tokenizer import Tokenizer
from tests.fixtures.models import CHAT_TEMPLATE
from tests.server.base_model.test_chat_tools import tokenizer_of
from tests.server.base_model.tool_templates import TEMPLATES

NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMATS = [*TEMPLATES, "json"]


def tokenizer(name: str) -> Tokenizer:
    return tokenizer_of(TEMPLATES.get(name, CHAT_TEMPLATE), "auto" if name in TEMPLATES else name)


@cache
def vocabulary(name: str) -> LLTokenizer:
    backend = tokenizer(name)._hf.backend_tokenizer
    return LLTokenizer(backend.to_str(), eos_token=backend.token_to_id("</s>"))


def use(mode: Mode, *, strict: bool = False, parallel: bool = True) -> ToolUse:
    functions = [
        FunctionDefinition(name="f", parameters=NUMBER, strict=strict),
        FunctionDefinition(name="g"),
    ]
    return ToolUse(functions, functions, mode, parallel, deprecated=False, place="tools")


def takes(name: str, tool_use: ToolUse, text: str, answer: str | None = None) -> bool:
    """Whether the grammar takes `text`, and that it may end there."""
    tokens = tokenizer(name)
    matcher = LLMatcher(vocabulary(name), calls_grammar(tokens, tool_use, answer), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return (
        all(matcher.consume_token(i) for i in tokens.encode(text, special=False)) and matcher.is_accepting()
    )


def written(name: str, *calls: tuple[str, Any]) -> str:
    return tokenizer(name).tools.format.write([(called, json.dumps(given)) for called, given in calls])


GOOD: tuple[str, Any] = ("f", {"a": 1})
WRONG: tuple[str, Any] = ("f", {"a": "x"})
EMPTY: tuple[str, Any] = ("g", {})


@pytest.mark.parametrize("name", FORMATS)
def test_a_required_call_is_the_whole_answer(name: str) -> None:
    required = use("required")
    assert takes(name, required, written(name, GOOD))
    assert takes(name, required, written(name, GOOD, EMPTY))
    assert not takes(name, required, written(name, WRONG))
    assert not takes(name, required, written(name, ("g", {"b": 1})))
    assert not takes(name, required, written(name, ("h", {})))
    assert not takes(name, required, "No.")
    assert not takes(name, required, "")


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_where_calls_are_not_parallel(name: str) -> None:
    single = use("required", parallel=False)
    assert takes(name, single, written(name, GOOD))
    assert not takes(name, single, written(name, GOOD, EMPTY))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_strict_call_is_held_to_its_schema_from_where_it_begins(name: str, parallel: bool) -> None:
    strict = use("auto", strict=True, parallel=parallel)
    assert takes(name, strict, "")
    assert takes(name, strict, "It is <b>5</b>.\nReally.")
    assert takes(name, strict, written(name, GOOD))
    assert takes(name, strict, written(name, GOOD, EMPTY)) == parallel
    assert not takes(name, strict, written(name, WRONG))
    assert not takes(name, strict, written(name, ("h", {})))
    if not tokenizer(name).tools.format.bare:
        assert takes(name, strict, "I look it up.\n" + written(name, GOOD))
        assert not takes(name, strict, "I look it up.\n" + written(name, WRONG))


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_or_an_answer_of_the_response_format(name: str) -> None:
    either, answer = (
        use("auto"),
        '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}',
    )
    assert takes(name, either, '{"city": "Paris"}', answer)
    assert takes(name, either, written(name, ("f", {"any": 1})), answer)
    assert not takes(name, either, "Paris", answer)


@pytest.mark.parametrize("name", ["llama3", "json"])
def test_references_of_a_schema_lead_where_it_stands(name: str) -> None:
    function = FunctionDefinition(
        name="f",
        parameters={"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}},
        strict=True,
    )
    referring = ToolUse([function], [function], "auto", parallel=True, deprecated=False, place="tools")
    assert takes(name, referring, written(name, GOOD), "{}")
    assert not takes(name, referring, '{"name": "f", "arguments": {"a": "x"}}', '{"required": ["b"]}')


def test_llamas_token_may_begin_a_strict_call() -> None:
    strict = use("auto", strict=True)
    assert takes("llama3", strict, "<|python_tag|>" + written("llama3", GOOD))
    assert not takes("llama3", strict, "<|python_tag|>" + written("llama3", WRONG))
