"""vLLM's routes for the tokenizer: what a prompt is to the engine, and back."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from anyio.to_thread import run_sync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.generation import prompts
from server.engine.fake import FakeEngine
from tests.server.api.conftest import CONTEXT
from tests.server.api.generation.test_completions import TOKENIZER, script
from tests.server.api.generation.tokenizers import TEMPLATE, VOCABULARY

MESSAGES = [{"role": "user", "content": "hello <|end|>"}]


def tokenize(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_text_has_the_tokens_that_the_engine_gets(http: httpx.Client, engine: FakeEngine) -> None:
    text = "hello world<|end|>"
    http.post("/v1/completions", json={"model": "toy", "prompt": text, "max_tokens": 1})
    assert tokenize(http, prompt=text, return_token_strs=True) == {
        "count": 6,
        "max_model_len": CONTEXT,
        "tokens": engine.seen[0].prompt,
        "token_strs": ["hello", "Ġwo", "r", "l", "d", "<|end|>"],
    }
    assert tokenize(http, prompt=text)["token_strs"] is None
    assert tokenize(http, prompt="") == {
        "count": 0,
        "max_model_len": CONTEXT,
        "tokens": [],
        "token_strs": None,
    }


def test_a_conversation_has_the_tokens_that_the_engine_gets(http: httpx.Client, engine: FakeEngine) -> None:
    """Control tokens that a message spells out are text here as well."""
    body = {"model": "toy", "messages": MESSAGES, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    whole = tokenize(http, model="toy", messages=MESSAGES)["tokens"]
    assert whole == engine.seen[0].prompt
    assert whole.count(TOKENIZER.end) == 1
    assert tokenize(http, messages=MESSAGES, add_generation_prompt=False)["tokens"] == whole[:-1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_detokenize_undoes_tokenize(http: httpx.Client, text: str) -> None:
    tokens = tokenize(http, prompt=text)["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


def test_special_tokens_are_shown(http: httpx.Client) -> None:
    tokens = [*script("hello"), TOKENIZER.end]
    assert (
        http.post("/detokenize", json={"model": "toy", "tokens": tokens}).json()["prompt"] == "hello<|end|>"
    )
    assert http.post("/detokenize", json={"tokens": []}).json()["prompt"] == ""


def test_long_texts_leave_the_event_loop_alone(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tokenised, and decoded, on a thread."""
    monkeypatch.setattr(prompts, "MAX_INLINE_CHARS", 64)
    threads: list[Callable[[], object]] = []

    async def recorded(work: Callable[[], object]) -> object:
        threads.append(work)
        return await run_sync(work)

    monkeypatch.setattr(prompts, "run_sync", recorded)
    text = "x" * 65
    tokens = tokenize(http, prompt=text)["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    tokenize(http, messages=[{"role": "user", "content": text}])
    assert len(threads) == 3
    tokenize(http, prompt="short")
    assert len(threads) == 3


def test_the_tokenizer_tells_of_itself(http: httpx.Client, engine: FakeEngine) -> None:
    """What evaluation harnesses read, and no path."""
    found = http.get("/tokenizer_info").json()
    assert found["eos_token"] == "<|end|>"
    assert found["chat_template"] == TEMPLATE
    assert found["tokenizer_class"]
    assert "/" not in str({name: value for name, value in found.items() if name != "chat_template"})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": 5}, "model"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}] * 2049}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCABULARY]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens.0"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
)
def test_mistakes_are_named(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].split(".")[0] == param.split(".")[0]


def test_a_model_must_exist_and_a_text_must_fit(http: httpx.Client) -> None:
    for path, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert (
            http.post(path, json={"model": "nobody", **fields}).json()["error"]["code"] == "model_not_found"
        )
    long = http.post("/tokenize", json={"prompt": "x" * 100_000})
    assert long.json()["error"]["code"] == "context_length_exceeded"
