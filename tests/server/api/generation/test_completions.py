"""POST /v1/completions through the real SDK and the real server."""

import json
from typing import Any

import httpx
import openai
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System
from tests.server.api.generation.tokenizers import byte_level_tokenizer
from tests.waiting import until

TOKENIZER = byte_level_tokenizer()


def script(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=False)


def test_a_completion_has_openais_shape(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.behaviour.script = script("hello é")
    answer = sdk.completions.create(model="toy", prompt="abcd", max_tokens=20)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "toy"
    assert answer.system_fingerprint == "fp_" + "b" * 16
    assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices] == [
        (0, "hello é", "stop", None)
    ]
    assert answer.usage is not None
    count = len(script("hello é"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, count)
    assert answer.usage.total_tokens == 4 + count
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_default_max_tokens_is_16_and_length_is_said(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="toy", prompt="x")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("chunk_tokens", [1, 3])
def test_a_streams_joined_text_is_the_text(sdk: openai.OpenAI, engine: FakeEngine, chunk_tokens: int) -> None:
    engine.behaviour.chunk_tokens = chunk_tokens
    fields: dict[str, Any] = {"model": "toy", "prompt": "abc", "max_tokens": 60, "temperature": 0}
    whole = sdk.completions.create(**fields)
    events = list(sdk.completions.create(**fields, stream=True))
    assert "".join(e.choices[0].text for e in events) == whole.choices[0].text
    assert [e.choices[0].finish_reason for e in events if e.choices[0].finish_reason] == ["length"]
    assert len({e.id for e in events}) == 1


def test_the_last_event_of_a_choice_says_why_it_ended_and_nothing_else(
    http: httpx.Client, engine: FakeEngine
) -> None:
    engine.behaviour.chunk_tokens = 3
    body = {"model": "toy", "prompt": "abc", "max_tokens": 3, "stream": True, "logprobs": 1}
    lines = http.post("/v1/completions", json=body).text.split("\n\n")
    first, last = (json.loads(line[6:])["choices"][0] for line in lines[:-2])
    assert first["text"]
    assert first["finish_reason"] is None
    assert last == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}


async def collect(client: openai.AsyncOpenAI, **fields: Any) -> str:
    stream = await client.completions.create(**fields, stream=True)
    return "".join([event.choices[0].text async for event in stream])


@pytest.mark.anyio
async def test_the_async_client_agrees(asdk: openai.AsyncOpenAI) -> None:
    fields: dict[str, Any] = {"model": "toy", "prompt": "abc", "max_tokens": 30, "temperature": 0}
    whole = await asdk.completions.create(**fields)
    assert await collect(asdk, **fields) == whole.choices[0].text


def test_usage_ends_a_stream_that_asks_for_it(http: httpx.Client) -> None:
    body = {"model": "toy", "prompt": "abc", "stream": True, "stream_options": {"include_usage": True}}
    lines = http.post("/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 16
    assert all(event["usage"] is None for event in events[:-1])


def test_stop_strings_cut_across_tokens_and_end_the_row(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.behaviour.script = script("one two three four") + [0] * 100
    engine.behaviour.step_seconds = 0.002
    fields: dict[str, Any] = {"model": "toy", "prompt": "abc", "max_tokens": 100, "stop": ["o th", "zzz"]}
    answer = sdk.completions.create(**fields)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one tw", "stop")
    streamed = list(sdk.completions.create(**fields, stream=True))
    assert "".join(e.choices[0].text for e in streamed) == "one tw"
    until(lambda: len(engine.cancelled) == 2)  # it is told in its own time


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(
    sdk: openai.OpenAI, engine: FakeEngine
) -> None:
    answer = sdk.completions.create(model="toy", prompt=["ab", "cde"], n=2, max_tokens=4, seed=7)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    first, second, third, fourth = engine.seen
    assert [row.prompt for row in engine.seen] == [script("ab")] * 2 + [script("cde")] * 2
    assert [row.sampling.seed for row in engine.seen] == [7, 8, 7, 8]
    assert (first.after, second.after, third.after, fourth.after) == (None, first.id, None, third.id)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)
    assert len({c.text for c in answer.choices}) == 4


def test_a_raw_prompt_writes_its_own_control_tokens(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    sdk.completions.create(model="toy", prompt="a<|end|>", max_tokens=1)
    assert engine.seen[0].prompt == [*script("a"), TOKENIZER.end]


def test_token_prompts_reach_the_engine_as_they_are(http: httpx.Client, engine: FakeEngine) -> None:
    for prompt in ([1, 2, 3], [[1, 2, 3], [4]]):
        assert http.post("/v1/completions", json={"model": "toy", "prompt": prompt}).status_code == 200
    assert [row.prompt for row in engine.seen] == [[1, 2, 3], [1, 2, 3], [4]]


def test_every_sampling_field_crosses(http: httpx.Client, engine: FakeEngine) -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.5,
        "seed": 42,
        "min_tokens": 3,
        "max_tokens": 9,
        "ignore_eos": True,
    }
    extra = {"logit_bias": {"7": -100}, "stop_token_ids": [8], "logprobs": 2, "user": "u"}
    body = {"model": "toy", "prompt": "x"} | sampling | extra
    assert http.post("/v1/completions", json=body).status_code == 200
    sent = engine.seen[0].sampling
    assert {name: getattr(sent, name) for name in sampling} == sampling
    assert (sent.logit_bias, sent.stop_token_ids, sent.logprobs) == ({7: -100.0}, (8,), 2)


def test_a_seed_is_drawn_when_none_is_given(http: httpx.Client, engine: FakeEngine) -> None:
    for _ in range(2):
        http.post("/v1/completions", json={"model": "toy", "prompt": "x", "max_tokens": 1})
    seeds = [row.sampling.seed for row in engine.seen]
    assert None not in seeds
    assert seeds[0] != seeds[1]


def test_logprobs_are_parallel_lists_that_fit_the_text(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.behaviour.script = script("a hello b")
    answer = sdk.completions.create(model="toy", prompt="x", max_tokens=50, logprobs=2, stop="b")
    found, text = answer.choices[0].logprobs, answer.choices[0].text
    assert text == "a hello "
    assert found is not None
    assert found.tokens is not None
    assert found.text_offset is not None
    assert found.top_logprobs is not None
    assert "".join(found.tokens) == text
    assert [text[o:].startswith(t) for o, t in zip(found.text_offset, found.tokens, strict=True)]
    assert found.token_logprobs == [-0.5] * len(found.tokens)
    assert all(t in top and len(top) == 2 for t, top in zip(found.tokens, found.top_logprobs, strict=True))


def test_streamed_logprobs_are_those_of_the_whole(http: httpx.Client, engine: FakeEngine) -> None:
    engine.behaviour.script = script("é hello 🙂 there")
    body = {"model": "toy", "prompt": "x", "max_tokens": 50, "logprobs": 1, "stop": ["re"]}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    lines = http.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")
    streamed: dict[str, list[Any]] = {name: [] for name in whole}
    for line in lines[:-2]:
        for name, values in (json.loads(line[6:])["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed == whole


def test_echo_puts_the_prompts_text_first(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.behaviour.script = script("!")
    for prompt in ("hello", script("hello")):
        fields: dict[str, Any] = {"model": "toy", "prompt": prompt, "echo": True}
        assert sdk.completions.create(**fields).choices[0].text == "hello!"
        assert "".join(e.choices[0].text for e in sdk.completions.create(**fields, stream=True)) == "hello!"


def test_an_error_before_the_first_token_has_its_own_status(
    http: httpx.Client, engine: FakeEngine, system: System
) -> None:
    engine.behaviour.step_seconds = 600.0  # steps end at multiples of it: none within the deadline
    body = {"model": "toy", "prompt": "x", "stream": True}
    answer = http.post("/v1/completions", json=body, headers={"x-request-timeout": "0.2"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
