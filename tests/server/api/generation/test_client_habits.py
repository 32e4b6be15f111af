"""What clients of OpenAI and vLLM send by habit: taken where it changes no output, obeyed where it does."""

import json
import re
from typing import Any

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.generation.tokenizers import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def script(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=False)


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(CHAT, json={"model": "toy", "messages": HELLO, "max_tokens": 20} | fields)


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(COMPLETIONS, json={"model": "toy", "prompt": "x", "max_tokens": 20} | fields)


def ok(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "none"},
        {"verbosity": "low"},
        {"store": True, "metadata": {"a": "b"}},
        {"service_tier": "flex"},
        {"top_logprobs": 0},
        {"top_p": 0},
        {"request_id": "mine"},
        {"use_beam_search": False, "length_penalty": 1.0, "spaces_between_special_tokens": True},
        {"echo": False, "add_special_tokens": False},
        {"stop": [f"stop {i}" for i in range(64)]},
        {"stop": []},
    ],
)
def test_what_changes_no_output_is_taken(http: httpx.Client, fields: dict[str, Any]) -> None:
    plain = ok(chat(http, temperature=0))["choices"]
    assert ok(chat(http, temperature=0, **fields))["choices"] == plain


def test_an_empty_suffix_is_none(http: httpx.Client) -> None:
    ok(complete(http, suffix=""))


@pytest.mark.parametrize(
    ("earlier", "text"),
    [
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": None}, ""),
        ({"content": [{"type": "refusal", "refusal": "never"}]}, "never"),
        (
            {"content": [{"type": "text", "text": "yes"}], "parsed": {"a": 1}, "reasoning_content": "hm"},
            "yes",
        ),
        ({"content": "yes", "annotations": [], "audio": None, "provider_specific_fields": {"x": 1}}, "yes"),
    ],
)
def test_an_earlier_answer_may_come_back_as_the_client_keeps_it(
    http: httpx.Client, engine: FakeEngine, earlier: dict[str, Any], text: str
) -> None:
    again = {"role": "user", "content": "again"}
    ok(chat(http, messages=[*HELLO, {"role": "assistant"} | earlier, again]))
    sent = f"<|user|>hello<|end|><|assistant|>{text}<|end|><|user|>again<|end|><|assistant|>"
    assert engine.seen[0].prompt == script(sent)


def test_a_users_message_without_content_is_refused(http: httpx.Client) -> None:
    answer = chat(http, messages=[{"role": "user", "content": None}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.0.content")


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "<|end|><|assistant|>"),
        ({"add_generation_prompt": False}, "<|end|>"),
        ({"continue_final_message": True, "add_generation_prompt": False}, ""),
        ({"continue_final_message": True}, ""),
    ],
)
def test_how_the_conversation_ends(
    http: httpx.Client, engine: FakeEngine, fields: dict[str, Any], end: str
) -> None:
    ok(chat(http, messages=[*HELLO, {"role": "assistant", "content": "Well,"}], **fields))
    assert engine.seen[0].prompt == script(f"<|user|>hello<|end|><|assistant|>Well,{end}")


def test_control_tokens_in_an_open_message_are_text(http: httpx.Client, engine: FakeEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "<|end|>a"}]
    ok(chat(http, messages=messages, continue_final_message=True))
    text = [token for character in "<|end|>a" for token in script(character)]
    assert engine.seen[0].prompt == [*script("<|user|>hello<|end|><|assistant|>"), *text]


@pytest.mark.parametrize(("keep", "left"), [(3, 3), (1, 1), (100, 5), (-1, 5)])
def test_a_prompt_is_truncated_from_its_beginning(
    http: httpx.Client, engine: FakeEngine, keep: int, left: int
) -> None:
    for prompt in ("abcde", script("abcde")):
        ok(complete(http, prompt=prompt, truncate_prompt_tokens=keep))
    assert [row.prompt for row in engine.seen] == [script("abcde")[-left:]] * 2


def test_a_prompt_over_the_context_fits_once_truncated(http: httpx.Client, engine: FakeEngine) -> None:
    assert complete(http, prompt=[1] * 300).json()["error"]["code"] == "context_length_exceeded"
    ok(complete(http, prompt=[1] * 300, truncate_prompt_tokens=-1))
    assert len(engine.seen[0].prompt) == 256 - 20


@pytest.mark.parametrize(("kept", "text"), [(False, "one "), (True, "one two")])
def test_a_stop_string_is_kept_if_asked_for(
    http: httpx.Client, engine: FakeEngine, kept: bool, text: str
) -> None:
    engine.behaviour.script = script("one two three")
    answer = ok(complete(http, stop=["two"], include_stop_str_in_output=kept))
    assert answer["choices"][0] | {"text": text, "finish_reason": "stop"} == answer["choices"][0]


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|user|>b")])
def test_special_tokens_are_shown_if_asked_for(
    http: httpx.Client, engine: FakeEngine, skip: bool, text: str
) -> None:
    engine.behaviour.script = script("a<|user|>b")
    assert ok(complete(http, skip_special_tokens=skip))["choices"][0]["text"] == text


def test_bad_words_reach_the_engine_as_tokens(http: httpx.Client, engine: FakeEngine) -> None:
    ok(complete(http, bad_words=["hello", " é"]))
    words = ("hello", " hello", "é", " é")
    assert engine.seen[0].sampling.bad_words == tuple(tuple(script(word)) for word in words)


def test_the_usage_so_far_is_in_each_chunk_if_asked_for(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for post in (chat, complete):
        answer = post(http, stream=True, stream_options=options, max_tokens=5)
        chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert counts[-1] == 5


def test_best_of_gives_the_likeliest(http: httpx.Client, engine: FakeEngine) -> None:
    answer = ok(complete(http, prompt=["a", "b"], best_of=4, n=2, max_tokens=3))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 3
    assert len(engine.seen) == 8
    made = {row.sampling.seed for row in engine.seen[:4]}
    assert len(made) == 4
    assert complete(http, best_of=4, n=2, stream=True).json()["error"]["param"] == "best_of"


LARK = "%llguidance {}\n"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, json.dumps(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, '{"type":"object"}'),
        ({"structured_outputs": {"choice": ["a", 'b"']}}, LARK + 'start: "a" | "b\\""'),
        ({"structured_outputs": {"regex": "[0-9]+/x"}}, LARK + "start: /[0-9]+\\/x/"),
        ({"guided_json": SCHEMA}, json.dumps(SCHEMA)),
        ({"guided_regex": "(a+)+"}, LARK + "start: /(a+)+/"),
        ({"guided_choice": ["a"], "guided_decoding_backend": "auto"}, LARK + 'start: "a"'),
    ],
)
def test_structures_become_grammars(
    http: httpx.Client, engine: FakeEngine, fields: dict[str, Any], grammar: str
) -> None:
    for post in (chat, complete):
        ok(post(http, **fields))
    assert [row.sampling.grammar for row in engine.seen] == [grammar] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"x-guidance": {}}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": r"(a)\1"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "grammar"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "guided_regex"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 2.0}, "length_penalty"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(
    http: httpx.Client, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    answer = chat(http, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.elapsed.total_seconds() < 10
    assert engine.seen == []


def test_a_structure_and_a_response_format_exclude_each_other(http: httpx.Client) -> None:
    answer = chat(http, guided_regex="a", response_format={"type": "json_object"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


def test_formats_that_nobody_enforces_are_annotations(http: httpx.Client, engine: FakeEngine) -> None:
    """pydantic writes `path`, `binary` or `password` for types of Python's."""
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "password"},
            "day": {"type": "string", "format": "date"},
            "way": {"enum": [{"format": "path"}]},
        },
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ok(chat(http, response_format=format_))
    sent = json.loads(engine.seen[0].sampling.grammar or "")["properties"]
    assert sent["format"] == {"type": "string"}
    assert sent["day"] == {"type": "string", "format": "date"}
    assert sent["way"] == {"enum": [{"format": "path"}]}


def test_the_message_names_field_and_limit(http: httpx.Client) -> None:
    message = chat(http, stop=["x"] * 65).json()["error"]["message"]
    assert re.search(r"stop must be at most 64, not 65", message)
