"""Function calls by a real server: a tiny random model, so only a grammar can make its calls right."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import Serving
from tests.fixtures.models import build_tiny
from tests.server.api.tools.schemas import random_schema
from tests.server.base_model.tool_templates import HERMES

SCHEMAS = 200
AT_ONCE = 8
CONTEXT = 2048
EXPLODING = "^((a{1,300}b{1,300}){1,300}|.{1,999}){1,999}$"
ASKED: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a server whose tiny model's template knows tools, with a context for long definitions."""
    folder = tmp_path_factory.mktemp("tools")
    model = folder / "caller"
    build_tiny("llama", model)
    _change(model / "config.json", max_position_embeddings=CONTEXT)
    _change(model / "tokenizer_config.json", model_max_length=CONTEXT)
    (model / "chat_template.jinja").write_text(HERMES)
    with Serving(str(model), folder / "server", *OPTIONS) as serving, serving.sdk(serving.tenant("t")) as sdk:
        yield sdk


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tool(name: str, parameters: Any, **fields: Any) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def test_the_arguments_of_required_calls_match_any_schema(sdk: openai.OpenAI) -> None:
    def call(seed: int) -> tuple[dict[str, Any], Any]:
        schema = random_schema(seed)
        made = sdk.chat.completions.create(
            model="caller",
            messages=ASKED,
            tools=[tool(f"f{seed}", schema)],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
        )
        return schema, made.choices[0]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for seed, (schema, choice) in enumerate(pool.map(call, range(SCHEMAS))):
            assert choice.finish_reason == "tool_calls", (seed, choice)
            (made,) = choice.message.tool_calls
            assert made.function.name == f"f{seed}"
            jsonschema.validate(json.loads(made.function.arguments), schema)
            assert choice.message.content is None


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def given(seed: int, **fields: Any) -> Any:
    tools = [tool("weather", CITY), tool("clock", None)]
    return {"model": "caller", "messages": ASKED, "tools": tools, "seed": seed} | fields


def test_a_streamed_call_is_the_call(sdk: openai.OpenAI) -> None:
    for seed in range(4):
        whole = sdk.chat.completions.create(**given(seed, tool_choice="required")).choices[0]
        with sdk.chat.completions.stream(**given(seed, tool_choice="required")) as stream:
            streamed = stream.get_final_completion().choices[0]
        calls, again = whole.message.tool_calls or [], streamed.message.tool_calls or []
        assert [(call.function.name, call.function.arguments) for call in again] == [
            (call.function.name, call.function.arguments) for call in calls if call.type == "function"
        ]
        assert calls
        assert streamed.finish_reason == whole.finish_reason == "tool_calls"


def test_a_result_is_answered_and_a_named_function_is_the_only_one(sdk: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "clock"}}
    message = sdk.chat.completions.create(**given(0, tool_choice=named)).choices[0].message
    (call,) = message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {})
    history = [*ASKED, message, {"role": "tool", "tool_call_id": call.id, "content": "noon"}]
    answer = sdk.chat.completions.create(**given(0, messages=history, max_tokens=8)).choices[0]
    assert answer.message.content


def test_a_pattern_that_explodes_ends_in_an_answer_or_a_sentence(sdk: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "pattern": EXPLODING}},
        "required": ["a"],
    }
    refusal = ""
    try:
        sdk.chat.completions.create(
            **given(0, tools=[tool("f", schema)], tool_choice="required", max_tokens=64)
        )
    except openai.APIStatusError as error:
        refusal = error.message
    assert not refusal or "schema" in refusal
    assert sdk.chat.completions.create(**given(0, tool_choice="required")).choices[0].message.tool_calls
