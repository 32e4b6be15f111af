"""Function calls through the unchanged `openai` client: an API over real parts, and scripted answers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, TypeAdapter

from server.api.schema.objects import ChatCompletion
from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, started
from tests.server.api.generation.tokenizers import byte_level_tokenizer
from tests.server.api.schema.test_openai_schemas import validate

TOKENIZER = byte_level_tokenizer()
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


SCHEMA = Weather.model_json_schema()
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
STRICT: Any = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
ARGUMENTS = '{"city": "Rome", "days": 2}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TICK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def system(valkey_url: str) -> Iterator[System]:
    """With a context that holds definitions."""
    with started(valkey_url, context=8192) as it:
        yield it


def says(engine: FakeEngine, text: str, chunk_tokens: int = 3) -> None:
    engine.behaviour.script = TOKENIZER.encode(text, special=False)
    engine.behaviour.chunk_tokens = chunk_tokens


def post(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": "toy", "messages": HELLO} | fields)


def deltas(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks, in their order."""
    lines = post(http, stream=True, **fields).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line[6:])["choices"][0] for line in lines[:-2]]


def test_a_call_has_openais_shape(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, CALL)
    answer = sdk.chat.completions.create(model="toy", messages=HELLO, tools=[WEATHER])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
    assert call.id.startswith("call_")
    assert len(call.id) == 29
    prompt = TOKENIZER.decode(engine.seen[0].prompt)
    assert "You may call functions" in prompt
    assert '{"name": "weather", "parameters": {"description": "The weather of a city."' in prompt
    assert engine.seen[0].sampling.grammar is None


def test_text_and_several_calls(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, f"I look.\n{CALL}\n{TICK}")
    message = (
        sdk.chat.completions.create(model="toy", messages=HELLO, tools=[WEATHER, CLOCK]).choices[0].message
    )
    assert message.content == "I look."
    calls = message.tool_calls or []
    assert [call.function.name for call in calls if call.type == "function"] == ["weather", "clock"]
    assert len({call.id for call in calls}) == 2
    single = sdk.chat.completions.create(
        model="toy", messages=HELLO, tools=[WEATHER, CLOCK], parallel_tool_calls=False
    )
    assert len(single.choices[0].message.tool_calls or []) == 1


@pytest.mark.parametrize("shape", [{"tools": [WEATHER]}, {"functions": [WEATHER["function"]]}])
def test_answers_are_valid_in_openais_document_and_ours(
    http: httpx.Client, engine: FakeEngine, shape: dict[str, Any]
) -> None:
    says(engine, CALL)
    whole = post(http, **shape).json()
    validate(whole, "CreateChatCompletionResponse")
    TypeAdapter(ChatCompletion).validate_python(whole)
    for line in post(http, stream=True, **shape).text.split("\n\n")[:-2]:
        validate(json.loads(line.removeprefix("data: ")), "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("chunk_tokens", [1, 7, 500])
def test_a_stream_is_openais(http: httpx.Client, engine: FakeEngine, chunk_tokens: int) -> None:
    says(engine, CALL, chunk_tokens)
    first, *pieces, last = deltas(http, tools=[STRICT])
    (call,) = first["delta"].pop("tool_calls")
    assert first["delta"] == {"role": "assistant", "refusal": None, "content": None}
    assert call.pop("id").startswith("call_")
    assert call == {"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}}
    assert all(piece["delta"].keys() == {"tool_calls"} for piece in pieces)
    parts = [piece["delta"]["tool_calls"][0] for piece in pieces]
    assert all(part.keys() == {"index", "function"} and part["index"] == 0 for part in parts)
    assert "".join(part["function"]["arguments"] for part in parts) == ARGUMENTS
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}
    if chunk_tokens == 1:
        assert len(parts) > 10


def test_calls_of_a_stream_are_not_interleaved_and_text_comes_first(
    http: httpx.Client, engine: FakeEngine
) -> None:
    says(engine, f"I look.\n{CALL}\n{TICK}")
    found = [choice["delta"] for choice in deltas(http, tools=[WEATHER, CLOCK])]
    assert found[0] == {"role": "assistant", "refusal": None, "content": found[0]["content"]}
    assert "".join(delta.get("content", "") for delta in found) == "I look."
    order = [delta["tool_calls"][0] for delta in found if "tool_calls" in delta]
    assert [call["index"] for call in order] == sorted(call["index"] for call in order)
    assert [call["function"]["name"] for call in order if "id" in call] == ["weather", "clock"]


def test_the_clients_stream_helper_reads_it(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, f"{CALL}\n{CALL}")
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    with sdk.chat.completions.stream(
        model="toy", messages=HELLO, tools=tools, stream_options={"include_usage": True}
    ) as stream:
        done = [
            event.parsed_arguments for event in stream if event.type == "tool_calls.function.arguments.done"
        ]
        final = stream.get_final_completion()
    assert done == [Weather(city="Rome", days=2)] * 2
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.usage is not None


def test_the_clients_parse_gives_objects(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, CALL)
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    message = sdk.chat.completions.parse(model="toy", messages=HELLO, tools=tools).choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Rome", days=2)
    assert engine.seen[0].sampling.grammar is not None
    history: list[Any] = [*HELLO, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert sdk.chat.completions.parse(model="toy", messages=history, tools=tools).choices


def test_a_loop_of_calls_and_results(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, CALL)
    first = sdk.chat.completions.create(model="toy", messages=HELLO, tools=[WEATHER]).choices[0].message
    (call,) = first.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny<|end|>"}]}
    says(engine, "Sunny.")
    messages: list[Any] = [*HELLO, first, result]
    second = sdk.chat.completions.create(model="toy", messages=messages, tools=[WEATHER]).choices[0]
    assert (second.message.content, second.finish_reason) == ("Sunny.", "stop")
    prompt = engine.seen[1].prompt
    tail = f"<|user|>hello<|end|><|assistant|>{CALL}<|end|><|user|><tool_response>\nsunny"
    text = "\n</tool_response>"
    spelt = [token for character in "<|end|>" for token in TOKENIZER.encode(character, special=False)]
    expected = [
        *TOKENIZER.encode(tail, special=False),
        *spelt,
        *TOKENIZER.encode(text + "<|end|><|assistant|>", special=False),
    ]
    assert prompt[-len(expected) :] == expected


@pytest.mark.parametrize(
    "text",
    [
        "Just text.",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city"',
        "<tool_call>",
    ],
)
def test_a_malformed_call_is_content(http: httpx.Client, engine: FakeEngine, text: str) -> None:
    says(engine, text)
    choice = post(http, tools=[WEATHER]).json()["choices"][0]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    streamed = deltas(http, tools=[WEATHER])
    assert "".join(piece["delta"].get("content") or "" for piece in streamed) == text


def test_a_choice_decides_who_may_be_called(http: httpx.Client, engine: FakeEngine) -> None:
    says(engine, TICK)
    both = {"tools": [WEATHER, CLOCK]}
    named = {"type": "function", "function": {"name": "clock"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    for choice, finish in [
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        (named, "stop"),
        (allowed, "tool_calls"),
    ]:
        answer = post(http, tool_choice=choice, **both).json()["choices"][0]
        assert answer["finish_reason"] == finish, choice
        assert answer["message"]["tool_calls"][0]["function"]["name"] == "clock"
    grammars = [row.sampling.grammar or "" for row in engine.seen]
    assert ["weather" in grammar for grammar in grammars] == [False, True, False, False]
    assert [bool(grammar) for grammar in grammars] == [False, True, True, True]
    none = post(http, tool_choice="none", **both).json()["choices"][0]
    assert (none["message"]["content"], none["finish_reason"]) == (TICK, "stop")
    assert "You may call functions" not in TOKENIZER.decode(engine.seen[-1].prompt)


def test_functions_in_the_deprecated_shape(http: httpx.Client, engine: FakeEngine) -> None:
    says(engine, CALL)
    given: dict[str, Any] = {"functions": [WEATHER["function"]]}
    choice = post(http, **given).json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": ARGUMENTS}
    first, *pieces, last = deltas(http, **given)
    assert first["delta"]["function_call"] == {"name": "weather", "arguments": ""}
    assert "".join(piece["delta"]["function_call"]["arguments"] for piece in pieces) == ARGUMENTS
    assert last["finish_reason"] == "function_call"
    forced = post(http, function_call={"name": "weather"}, **given).json()["choices"][0]
    assert (forced["finish_reason"], bool(engine.seen[-1].sampling.grammar)) == ("stop", True)
    history = [
        *HELLO,
        {"role": "assistant", "content": None, "function_call": choice["message"]["function_call"]},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    assert post(http, messages=history, **given).status_code == 200
    assert "sunny" in TOKENIZER.decode(engine.seen[-1].prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
        {"function_call": "none"},
        {"messages": [*HELLO, {"role": "assistant", "content": "hi", "tool_calls": []}, *HELLO]},
        {"messages": [*HELLO, {"role": "assistant", "content": None, "refusal": "no"}, *HELLO]},
    ],
)
def test_no_tools_are_no_tools(http: httpx.Client, fields: dict[str, Any]) -> None:
    assert post(http, max_tokens=2, **fields).status_code == 200


def test_a_response_format_is_for_answers_without_calls(http: httpx.Client, engine: FakeEngine) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    says(engine, CALL)
    assert (
        post(http, tools=[WEATHER], response_format=format_).json()["choices"][0]["finish_reason"]
        == "tool_calls"
    )
    says(engine, "{}")
    assert (
        post(http, tools=[WEATHER], response_format=format_).json()["choices"][0]["message"]["content"]
        == "{}"
    )
    assert all("answer: %json" in (row.sampling.grammar or "") for row in engine.seen)


def test_structured_outputs_beside_functions_are_json(http: httpx.Client, engine: FakeEngine) -> None:
    says(engine, "{}")
    for fields in ({"structured_outputs": {"json": {"type": "object"}}}, {"guided_json": {"type": "object"}}):
        choice = post(http, tools=[WEATHER], **fields).json()["choices"][0]
        assert choice["message"]["content"] == "{}"
    assert all("answer: %json" in (row.sampling.grammar or "") for row in engine.seen)
    assert post(http, tools=[WEATHER], tool_choice="none", guided_regex="[{}]+").status_code == 200
    error = post(http, tools=[WEATHER], guided_regex="a").json()["error"]
    assert (error["param"], "beside tools" in error["message"]) == ("structured_outputs", True)


def test_formats_that_nobody_enforces_are_annotations_of_arguments(
    http: httpx.Client, engine: FakeEngine
) -> None:
    given = {"properties": {"a": {"type": "string", "format": "password"}}}
    assert post(http, max_tokens=2, **function(parameters=given)).status_code == 200
    assert "password" not in (engine.seen[0].sampling.grammar or "password")


def test_an_answer_is_continued_where_there_are_functions(http: httpx.Client, engine: FakeEngine) -> None:
    says(engine, CALL)
    begun = [*HELLO, {"role": "assistant", "content": "I look.\n"}]
    choice = post(http, messages=begun, tools=[WEATHER], continue_final_message=True).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    prompt = TOKENIZER.decode(engine.seen[0].prompt, special=True)
    assert "You may call functions" in prompt
    assert prompt.endswith("<|assistant|>I look.\n")


def test_the_usage_so_far_is_in_each_chunk_of_a_call(http: httpx.Client, engine: FakeEngine) -> None:
    says(engine, CALL)
    options = {"include_usage": True, "continuous_usage_stats": True}
    lines = post(http, stream=True, stream_options=options, tools=[STRICT]).text.split("\n\n")[:-2]
    counts = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] == len(engine.behaviour.script or [])


def test_tokenize_counts_functions_as_a_chat_does(http: httpx.Client, engine: FakeEngine) -> None:
    assert post(http, tools=[WEATHER], max_tokens=2).status_code == 200
    body = {"messages": HELLO, "tools": [WEATHER]}
    assert http.post("/tokenize", json=body).json()["tokens"] == engine.seen[0].prompt


def test_logprobs_are_of_all_tokens(http: httpx.Client, engine: FakeEngine) -> None:
    says(engine, CALL)
    tokens = len(engine.behaviour.script or [])
    whole = post(http, tools=[WEATHER], logprobs=True).json()["choices"][0]
    assert len(whole["logprobs"]["content"]) == tokens
    streamed = deltas(http, tools=[WEATHER], logprobs=True)
    assert sum(len((piece["logprobs"] or {"content": []})["content"]) for piece in streamed) == tokens


def recursive(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": recursive(depth - 1)}} if depth else {"type": "object"}


def wide(count: int) -> dict[str, Any]:
    return {"properties": {f"p{i}": {"type": "string"} for i in range(count)}}


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}], "tool_choice": "required"}


LOOP = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}
EXPLODING = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(x{1,1000}){1,1000}y"}}}
PATH = "tools[0].function.parameters"
MESSAGE: Any = {
    "role": "assistant",
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}],
}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        (function(name="x" * 10_000), "tools.0.function.name", "at most 128 characters"),
        (function(name="f g"), "tools.0.function.name", "pattern"),
        (function(parameters={"type": "string"}), "tools", "must have the type object, not 'string'"),
        (function(parameters=recursive(120)), "body", "nested deeper than 128"),
        (function(parameters=wide(3000)), PATH, "characters of the schema"),
        (function(parameters=wide(9000)), "messages", "The model's context is 8192 tokens"),
        (
            function(parameters={"properties": {"a": {"pattern": r"(a)\1", "type": "string"}}}),
            PATH,
            "cannot be used",
        ),
        (function(parameters={"x-guidance": {}}), PATH, "x-guidance, which is not supported"),
        (function(parameters={"const": float("inf")}), "tools", "not finite"),
        ({"tools": [CLOCK] * 129}, "tools", "at most 128, not 129"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "two functions called 'clock'"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "custom are not supported"),
        ({"tool_choice": "required"}, "tool_choice", "only allowed when 'tools' are specified"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice", "not 'any'"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "not defined",
        ),
        ({"tools": [CLOCK], "functions": [CLOCK["function"]]}, "functions", "cannot go with tools"),
        ({"function_call": {"name": "f"}}, "function_call", "needs functions"),
        ({"messages": [*HELLO, RESULT]}, "messages.[1].role", "must be a response to a preceeding message"),
        ({"messages": [*HELLO, MESSAGE]}, "messages.[2].role", "did not have response messages: c"),
        ({"messages": [*HELLO, MESSAGE, *HELLO]}, "messages.[2].role", "did not have response messages: c"),
        (
            {"messages": [HELLO[0] | {"tool_calls": MESSAGE["tool_calls"]}]},
            "messages.0.role",
            "must be assistant",
        ),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    http: httpx.Client, fields: dict[str, Any], param: str, sentence: str
) -> None:
    body = json.dumps({"model": "toy", "messages": HELLO} | fields)
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert sentence in error["message"]
    if param != "body":
        assert error["param"] == param


def test_a_schema_that_is_not_enforced_need_not_compile(http: httpx.Client, engine: FakeEngine) -> None:
    says(engine, "ok")
    lax = function(parameters={"properties": {"a": {"not": {"type": "string"}}}})
    assert post(http, **lax).status_code == 400
    assert post(http, **lax | {"tool_choice": "auto"}).status_code == 200


@pytest.mark.parametrize("schema", [LOOP, EXPLODING])
def test_what_the_grammar_engine_bounds_itself_is_taken(http: httpx.Client, schema: dict[str, Any]) -> None:
    assert post(http, max_tokens=2, **function(parameters=schema)).status_code == 200


def test_arguments_that_are_no_json_are_shown_as_they_are(http: httpx.Client, engine: FakeEngine) -> None:
    assert post(http, messages=[*HELLO, MESSAGE, RESULT], max_tokens=2).status_code == 200
    assert '"arguments": {}' in TOKENIZER.decode(engine.seen[0].prompt)
