"""Scores of prompts, in OpenAI's lists with `echo`, and as vLLM's `prompt_logprobs`."""

import json
from typing import Any

import httpx
import openai
import pytest

from server.api.generation.engine_requests import MAX_PROMPT_LOGPROBS, RouteOptions, _check_prompt_logprobs
from server.api.generation.prompt_logprobs import _echo_logprobs
from server.engine.fake import FakeEngine
from server.errors import InvalidField
from tests.server.api.conftest import System
from tests.server.api.generation.test_completions import TOKENIZER, script
from tests.server.api.generation.tokenizers import byte_fallback_tokenizer

PROMPT = "a hello"
Answer = dict[str, Any]


def completion(http: httpx.Client, **fields: Any) -> Answer:
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1} | fields
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: Answer = answer.json()
    return found


def test_echo_with_no_token_to_generate_scores_the_prompt(http: httpx.Client, engine: FakeEngine) -> None:
    for prompt in (PROMPT, script(PROMPT)):
        answer = completion(http, prompt=prompt)
        assert answer["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 0,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        (choice,) = answer["choices"]
        assert choice == {
            "index": 0,
            "text": PROMPT,
            "finish_reason": "length",
            "logprobs": {
                "text_offset": [0, 1, 2],
                "token_logprobs": [None, -0.5, -0.75],
                "tokens": ["a", " ", "hello"],
                "top_logprobs": [None, {" ": -0.5, "\x7f": -0.375}, {"hello": -0.75, " w": -0.625}],
            },
        }
    sent = engine.seen[0].sampling
    assert (sent.max_tokens, sent.logprobs, sent.prompt_logprobs) == (0, 1, 1)


def test_the_prompts_scores_come_before_those_of_the_answer(http: httpx.Client, engine: FakeEngine) -> None:
    """Until its end token, of which there is no text: evaluation harnesses leave out the last entry."""
    engine.behaviour.script = [*script("! é"), TOKENIZER.end or 0]
    end = {"stop_token_ids": [TOKENIZER.end]}
    (choice,) = completion(http, max_tokens=9, **end)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a hello! é", "stop")
    found = choice["logprobs"]
    assert found["tokens"] == ["a", " ", "hello", "!", " ", *script_texts("é"), "<|end|>"]
    assert found["token_logprobs"] == [None, -0.5, -0.75, *[-0.5] * 5]
    assert found["text_offset"] == [0, 1, 2, 7, 8, 9, 9, 10]
    assert [len(values) for values in found.values()] == [8] * 4
    (silent,) = completion(http, max_tokens=9, echo=False, **end)["choices"]
    assert silent["logprobs"]["tokens"] == found["tokens"][3:-1], "without echo an answer ends with its text"


def script_texts(text: str) -> list[str]:
    return [TOKENIZER.token_text(token)[0] for token in script(text)]


def test_a_stream_has_the_same_lists(http: httpx.Client, engine: FakeEngine) -> None:
    fields: dict[str, Any] = {"prompt": [PROMPT, "hell"], "n": 2, "max_tokens": 5, "temperature": 0}
    whole = completion(http, **fields)["choices"]
    body = {"model": "toy", "echo": True, "logprobs": 1, "stream": True} | fields
    lines = http.post("/v1/completions", json=body).text.split("\n\n")
    streamed = [
        {"index": i, "text": "", "logprobs": {name: [] for name in whole[0]["logprobs"]}} for i in range(4)
    ]
    for line in lines[:-2]:
        (choice,) = json.loads(line[6:])["choices"]
        into: Answer = streamed[choice["index"]]
        into["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            into["logprobs"][name] += values
    for choice in whole:
        choice.pop("finish_reason")
    assert streamed == whole


def test_batches_are_scored_prompt_by_prompt_once_for_all_choices(
    http: httpx.Client, engine: FakeEngine
) -> None:
    prompts = [script("hello w"), script("ab"), script("x")]
    choices = completion(http, prompt=prompts, n=2, max_tokens=1)["choices"]
    assert [c["logprobs"]["tokens"][:-1] for c in choices[::2]] == [["hello", " w"], ["a", "b"], ["x"]]
    for first, second in zip(choices[::2], choices[1::2], strict=True):
        prompt = len(first["logprobs"]["tokens"]) - 1
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert first["logprobs"][name][:prompt] == second["logprobs"][name][:prompt]
    assert [row.sampling.prompt_logprobs for row in engine.seen] == [1, None] * 3


def test_prompt_logprobs_have_vllms_shape(http: httpx.Client, engine: FakeEngine) -> None:
    body = {"model": "toy", "prompt": "hello w", "max_tokens": 1, "prompt_logprobs": 3}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert choice["logprobs"] is None
    (w,) = script(" w")
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second == {
        str(w): {"logprob": -0.5, "rank": 2, "decoded_token": " w"},
        str(w + 1): {"logprob": -0.375, "rank": 1, "decoded_token": " wo"},
        str(w - 1): {"logprob": -0.625, "rank": 3, "decoded_token": "hello"},
    }
    assert next(iter(second)) == str(w), "the prompt's own token comes first"


@pytest.mark.parametrize("count", [0, 2])
def test_echo_and_prompt_logprobs_each_show_their_own_count(
    http: httpx.Client, engine: FakeEngine, count: int
) -> None:
    (choice,) = completion(http, logprobs=1, prompt_logprobs=count)["choices"]
    assert [len(top or ()) for top in choice["logprobs"]["top_logprobs"]] == [0, 2, 2]
    assert [len(top or ()) for top in choice["prompt_logprobs"]] == [0, max(1, count), max(1, count)]
    assert engine.seen[0].sampling.prompt_logprobs == max(1, count)


def test_a_conversation_is_scored_as_the_template_renders_it(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    answer = sdk.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=1,
        extra_body={"prompt_logprobs": 0},
    )
    assert answer.model_extra is not None
    scores = answer.model_extra["prompt_logprobs"]
    assert scores[0] is None
    assert [int(token) for score in scores[1:] for token in score] == engine.seen[0].prompt[1:]
    assert [next(iter(score.values()))["decoded_token"] for score in scores[1:]] == [
        "hello",
        "<|end|>",
        "<|assistant|>",
    ]


def test_a_single_token_has_nothing_to_score(http: httpx.Client) -> None:
    (choice,) = completion(http, prompt=[5], prompt_logprobs=2)["choices"]
    assert choice["logprobs"]["token_logprobs"] == choice["prompt_logprobs"] == [None]


def test_a_prompt_may_fill_the_context_if_nothing_follows(http: httpx.Client, system: System) -> None:
    context = system.engine.base.max_context
    (choice,) = completion(http, prompt=[5] * context)["choices"]
    assert len(choice["logprobs"]["tokens"]) == context
    body = {"model": "toy", "prompt": [5] * context, "max_tokens": 1}
    assert http.post("/v1/completions", json=body).json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0, "min_tokens": 1}, "min_tokens"),
    ],
)
def test_what_is_refused(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/completions", json={"model": "toy", "prompt": "x"} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_an_answer_holds_a_bounded_number_of_them() -> None:
    """A prompt of 100,000 tokens with 20 alternatives each, not two of them."""
    one = RouteOptions("cmpl", [[1] * 100_000], 0, None, None, prompt_logprobs=20)
    _check_prompt_logprobs(one, 1)
    with pytest.raises(InvalidField, match=str(MAX_PROMPT_LOGPROBS)):
        _check_prompt_logprobs(one, 2)


def test_offsets_leave_out_the_space_that_sentencepiece_adds() -> None:
    tokenizer = byte_fallback_tokenizer()
    prompt = tokenizer.encode("ab a")
    texts = [tokenizer.token_text(token)[0] for token in prompt]
    found = _echo_logprobs(tokenizer, prompt, [], 0, echo="ab a")
    assert "".join(texts) == " ab a"
    assert found["text_offset"] == [max(0, len("".join(texts[:i])) - 1) for i in range(len(texts))]
