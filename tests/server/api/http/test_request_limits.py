"""What is too much is refused before work is done on it, and what fits the context is not."""

import json
import threading
import time
from itertools import pairwise
from typing import Any

import httpx
import pytest

from server.api.http import json_body as body_module
from server.api.http.json_body import parse
from server.engine.fake import FakeEngine
from server.errors import InvalidField, InvalidRequest
from tests.server.api.conftest import CONTEXT, System
from tests.server.api.generation.tokenizers import VOCABULARY, byte_level_tokenizer
from tests.server.api.http.test_hostile_input import JSON, URL, refused

CHAT = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "a"}
MB = 1_000_000


def crowded(unit: str, size: int = MB) -> str:
    """A list of so many bytes."""
    return "[" + ",".join([unit] * (size // (len(unit) + 1))) + "]"


CROWDED = {
    "prompt": ["[]", "{}", "1", '""', '{"a":1}', "[[]]", "1e9"],
    "metadata": ["[]", '{"a":{}}'],
    "adapters": ['{"name":"a"}'],
    "stop": ['"a"'],
    "model": ["[]", "1"],
}


@pytest.mark.parametrize(
    ("field", "unit"), [(field, unit) for field, units in CROWDED.items() for unit in units]
)
def test_a_crowded_body_is_refused_before_it_is_parsed(
    http: httpx.Client, engine: FakeEngine, field: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "read_json", None)
    given = {"model": '"toy"', "prompt": '"x"'} | {field: crowded(unit)}
    raw = "{" + ",".join(f'"{name}":{value}' for name, value in given.items()) + "}"
    answer = http.post(URL, content=raw, headers=JSON)
    assert "at most" in refused(answer, 400)
    assert engine.seen == []


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 200 + b"]" * 200,
        b'{"a":' * 130 + b"1" + b"}" * 130,
        b"[" * 5000 + b"]" * 5000,
    ],
)
def test_what_is_nested_too_deeply_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(b'{"a":' + raw + b"}")


def test_marks_inside_of_texts_do_not_count() -> None:
    text = "{[:," * 50_000 + '\\"{' + "\\\\"
    raw = json.dumps({"prompt": text, "more": [text]}).encode()
    assert parse(raw)["more"] == [text]
    for mark in ("[]", "{}"):
        with pytest.raises(InvalidField, match="at most 10000"):
            parse(b'{"a":' + crowded(mark, 100_000).encode() + b"}")
    with pytest.raises(InvalidField, match="at most 20000 fields"):
        parse(("{" + ",".join(f'"k{i}":1' for i in range(20_001)) + "}").encode())


def test_texts_and_messages_over_the_context_are_refused_before_they_are_tokenised(
    http: httpx.Client, engine: FakeEngine, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = http.get("/v1/limits").json()
    chars, messages = limits["max_prompt_chars"], limits["max_messages"]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("work was done on what does not fit")

    for name in ("encode", "render_chat"):
        monkeypatch.setattr(system.app.state.services.tokenizer, name, never)
    long = "a " * (chars // 2 + 1)
    for url, fields in (
        (URL, {"prompt": long}),
        (URL, {"prompt": ["x", long][::-1]}),
        (URL, {"prompt": [1] * (CONTEXT + 1)}),
        (URL, {"prompt": [["a"] * (CONTEXT + 1)]}),
        (CHAT, {"messages": [MESSAGE | {"content": long}]}),
        (CHAT, {"messages": [MESSAGE | {"content": "a" * (chars // 100 + 1)}] * 100}),
    ):
        answer = http.post(url, json={"model": "toy"} | fields)
        refused(answer, 400)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    parts = [{"type": "text", "text": "a"}] * (messages // 2)
    many: tuple[list[Any], ...] = ([MESSAGE] * (messages + 1), [{"role": "user", "content": parts}] * 2)
    for conversation in many:
        refused(http.post(CHAT, json={"model": "toy", "messages": conversation}), 400, "messages")
    assert engine.seen == []


def test_every_prompt_that_fits_is_taken(http: httpx.Client, engine: FakeEngine) -> None:
    engine.behaviour.stop_after = 0
    longest = [VOCABULARY - 1] * (CONTEXT - 1)
    assert http.post(URL, json={"model": "toy", "prompt": [longest] * 16}).status_code == 200
    assert http.post(URL, json={"model": "toy", "prompt": "<|assistant|>" * (CONTEXT - 1)}).status_code == 200
    assert [len(row.prompt) for row in engine.seen] == [CONTEXT - 1] * 17


def test_a_large_body_is_parsed_and_a_long_text_tokenised_off_the_loop(
    http: httpx.Client, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    tokenizer = system.app.state.services.tokenizer
    real_parse, real_encode = body_module.parse, tokenizer.encode

    def parse(*given: Any) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return real_parse(*given)

    def encode(*given: Any, **named: Any) -> list[int]:
        threads.append(threading.current_thread().name)
        ids: list[int] = real_encode(*given, **named)
        return ids

    monkeypatch.setattr(body_module, "parse", parse)
    monkeypatch.setattr(tokenizer, "encode", encode)
    monkeypatch.setattr("server.api.generation.prompts.MAX_INLINE_CHARS", 100)
    text, padding = "hello" * 30, " " * 20_000
    assert http.post(URL, content=json.dumps({"model": "toy", "prompt": text}) + padding).status_code == 200
    loop_thread = system.call(_name())
    assert len(threads) == 2
    assert loop_thread not in threads


def test_tokenising_a_long_text_lets_other_threads_run() -> None:
    """In share of the time it takes, so on any machine: it does not hold the interpreter's lock."""
    tokenizer, text = byte_level_tokenizer(), "hello world " * 50_000
    ends: list[float] = []

    def encode() -> None:
        ends.append(time.perf_counter())
        tokenizer.encode(text)
        ends.append(time.perf_counter())

    thread = threading.Thread(target=encode)
    ticks = [time.perf_counter()]
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())
    start, end = ends
    gaps = [after - before for before, after in pairwise(ticks) if before < end and after > start]
    assert max(gaps) < (end - start) / 2


async def _name() -> str:
    return threading.current_thread().name


@pytest.mark.parametrize(
    ("metadata", "status"),
    [
        ({f"k{i}": "v" for i in range(16)}, 200),
        ({f"k{i}": "v" for i in range(17)}, 400),
        ({"k" * 64: "v" * 512}, 200),
        ({"k" * 65: "v"}, 400),
        ({"\n" * 100_000: "v"}, 400),
        ({"k": "v" * 513}, 400),
        ({"": "v"}, 400),
    ],
)
def test_metadata_is_capped_as_openais(http: httpx.Client, metadata: dict[str, str], status: int) -> None:
    body = {"model": "toy", "prompt": "x", "max_tokens": 1, "metadata": metadata}
    answer = http.post(URL, json=body)
    assert answer.status_code == status, answer.text
    if status == 400:
        refused(answer, 400)
