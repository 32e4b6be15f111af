"""Input no honest client sends: each piece is refused in OpenAI's shape, by name, and nothing is lost."""

import json
import socket
from typing import Any

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.fixtures.cost import processor_seconds
from tests.server.api.conftest import System

URL = "/v1/completions"
JSON = {"content-type": "application/json"}


def refused(answer: httpx.Response, status: int, param: str | None = None) -> str:
    """The message, after everything every refusal has in common."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"]
    assert answer.headers["x-request-id"].startswith("req_")
    message: str = error["message"]
    for leak in ("Traceback", "/work", "site-packages", " at 0x", "\n"):
        assert leak not in message
    assert len(message) < 400
    if param is not None:
        assert error["param"] == param
    return message


BAD_VALUES: dict[str, list[Any]] = {
    "max_tokens": [-1, 2**63, "5", 1.5, True, [], {}],
    "temperature": [-0.1, 2.1, "1", True, 10**400],
    "top_p": [1.1, -1],
    "top_k": [-2, 1.5, 2**40],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 11],
    "seed": [2**63, -(2**63) - 1, 0.5],
    "n": [0, 9, 10**9],
    "logprobs": [-1, 21, True],
    "best_of": [9, 0],
    "stop": [[""], ["x"] * 65, "x" * 257, 5, ["a", 5], ["x"] * 19_000],
    "stop_token_ids": [[-1], [10_000], ["1"], [1] * 65, "1"],
    "logit_bias": [
        *({"x": 1}, {"-1": 1}, {"9999": 1}, {"1": 101}, {"1": "2"}, [1], {"²": 1}),
        {str(i): 1 for i in range(301)},
    ],
    "min_tokens": [-1, 17, 10_000],
    "prompt": [
        *("", [], [[]], [""], {}, 5, [1.5], ["a", 1], [True]),
        *([-1], [10**30], [[1], [266]], ["x"] * 17, [[1]] * 17),
    ],
    "prompt_embeds": ["AAAA", []],
    "suffix": ["x"],
    "stream": ["true", 1],
    "stream_options": [5, {"include_usage": 1}, {"include_usage": True}],
    "prompt_cache_options": [5, {"mode": "explicit"}, {"mode": "implicit", "ttl": 5}],
    "adapters": [[{"name": "a"}] * 5, [{"name": 5}], {}],
    "metadata": [[], {"a": 1}, {f"k{i}": "v" for i in range(17)}],
    "echo": ["yes"],
    "prompt_logprobs": [-1, 21, True, "1"],
    "model": [5, "", "x" * 513],
}
OUT_OF_RANGE = [(field, value) for field, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_a_field_out_of_range_is_400_and_named(
    http: httpx.Client, engine: FakeEngine, field: str, value: Any
) -> None:
    body = json.dumps({"model": "toy", "prompt": "x"} | {field: value})
    with processor_seconds(1):
        answer = http.post(URL, content=body, headers=JSON)
    message = refused(answer, 400)
    assert field in message
    assert answer.json()["error"]["param"].split(".")[0] == field
    assert engine.seen == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e309", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_numbers_that_are_not_finite_are_400(http: httpx.Client, field: str, number: str) -> None:
    body = f'{{"model": "toy", "prompt": "x", "{field}": {number}}}'
    refused(http.post(URL, content=body, headers=JSON), 400, field)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"x"', 400),
        (b'{"model": "toy", "prompt": "\xff"}', 400),
        (b'{"model": "toy", "model": "other", "prompt": "x"}', 400),
        (b'{"model": "toy", "prompt": "x", "metadata": {"a": "1", "a": "2"}}', 400),
        (b'{"model": "toy", "prompt": "\\ud800"}', 400),
        (b'{"model": "\\uDFFF", "prompt": "x"}', 400),
        (b"[" * 10_000 + b"]" * 10_000, 400),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400),
        (b'{"model": "toy", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "toy"}', 400),
        (b'{"prompt": "x"}', 400),
        (b'{"model": "toy", "prompt": "x", "unknown_field\\u0007": 1}', 400),
        (b'{"model": "toy", "prompt": "x", "tenant_id": "other"}', 400),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(60_000)) + b"}", 400),
        (b'{"model": "toy", "prompt": "' + b"x" * (1 << 20) + b'"}', 413),
    ],
)
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, body: bytes, status: int) -> None:
    with processor_seconds(1):
        refused(http.post(URL, content=body, headers=JSON), status)


def test_a_chunked_body_over_the_cap_is_413(http: httpx.Client) -> None:
    chunks = (b" " * 65536 for _ in range(64))
    refused(http.post(URL, content=chunks, headers=JSON), 413)


def test_a_declared_length_over_the_cap_is_413_unread(system: System, key: str) -> None:
    host, port = system.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n".encode())
        assert raw.recv(64).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_arrives_ends(system: System, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.http.json_body.BODY_SECONDS", 0.3)
    host, port = system.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        raw.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert raw.recv(64).startswith(b"HTTP/1.1 504")


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}],
)
def test_other_kinds_of_body_are_415(http: httpx.Client, headers: dict[str, str]) -> None:
    refused(http.post(URL, content=b"{}", headers=headers), 415)


def test_a_prompt_over_the_context_is_400_with_both_counts(http: httpx.Client, engine: FakeEngine) -> None:
    for prompt, max_tokens in (([1] * 256, None), ([1] * 300, None), ([1] * 250, 7), ("x" * 9000, 1)):
        body = {"model": "toy", "prompt": prompt, "max_tokens": max_tokens}
        answer = http.post(URL, json=body)
        message = refused(answer, 400)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "256" in message
        assert str(len(prompt)) in message
    assert http.post(URL, json={"model": "toy", "prompt": [1] * 250}).json()["usage"]["total_tokens"] == 256
    assert len(engine.seen) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_deadline_that_is_none_is_400(http: httpx.Client, seconds: str) -> None:
    body = {"model": "toy", "prompt": "x"}
    refused(http.post(URL, json=body, headers={"x-request-timeout": seconds}), 400)


@pytest.mark.parametrize(
    "model", ["nobody", "../x", "toy@1", "a@b@c", "x" * 500, "a\nb", "toy ", "ft:toy:o:s:1", "é", "@", "a@"]
)
def test_an_unknown_model_is_404_and_never_the_base(
    http: httpx.Client, engine: FakeEngine, model: str
) -> None:
    answer = http.post(URL, json={"model": model, "prompt": "x"})
    message = refused(answer, 404, "model")
    assert answer.json()["error"]["code"] == "model_not_found"
    assert message.startswith("The model `")
    assert engine.seen == []


def test_unknown_routes_and_methods_have_the_same_shape(http: httpx.Client) -> None:
    refused(http.get("/v1/nothing"), 404)
    refused(http.get("/"), 404)
    for method, path, allowed in (
        ("PUT", URL, "POST"),
        ("PUT", "/v1/adapters", "GET, POST, HEAD"),
        ("PATCH", "/v1/models/toy", "GET, DELETE, HEAD"),
        ("HEAD", URL, "POST"),
    ):
        answer = http.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
        if method != "HEAD":
            refused(answer, 405)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files?limit={}",
        "/v1/fine_tuning/jobs?limit={}",
        "/v1/fine_tuning/jobs/ftjob-x/checkpoints?limit={}",
        "/v1/fine_tuning/jobs/ftjob-x/events?stream={}",
        "/v1/adapters?limit={}",
        "/v1/adapters?deleted={}",
    ],
)
@pytest.mark.parametrize("value", ["", "x", "é" * 600, "1.5", "9" * 4500])
def test_a_query_value_of_another_kind_is_refused_and_not_repeated(
    http: httpx.Client, path: str, value: str
) -> None:
    answer = http.get(path.format(value))
    message = refused(answer, 400, path.rpartition("?")[2].partition("=")[0])
    assert len(value) < 9 or value not in message


@pytest.mark.parametrize("given", ["mine", "a\tb", "x" * 4000, "req_" + "0" * 32])
def test_a_clients_request_id_is_never_repeated(http: httpx.Client, given: str) -> None:
    answer = http.get("/v1/models", headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
    assert answer.headers["x-request-id"] != given


def test_a_broken_handler_is_a_500_without_a_detail(
    http: httpx.Client, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret /path at 0x7f")

    monkeypatch.setattr(system.app.state.services.registry, "list", broken)
    answer = http.get("/v1/models")
    assert "secret" not in refused(answer, 500)
    assert answer.headers["x-request-id"] not in answer.text
