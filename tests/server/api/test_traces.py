"""A traced server: what spans real requests leave, and the ids in headers and log lines."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.api.app import build_app
from server.logs import request_id
from server.settings import Settings
from server.tracing import Tracing
from tests.fixtures.services import empty
from tests.server.api.conftest import System, running
from tests.server.api.generation.tokenizers import byte_level_tokenizer
from tests.waiting import until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROMPT = "a secret prompt"


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(valkey_url: str, spans: InMemorySpanExporter) -> Iterator[System]:
    empty(valkey_url)
    folder = Path(tempfile.mkdtemp(prefix="pp"))
    byte_level_tokenizer(folder / "model")
    settings = Settings(model=str(folder / "model"), data_dir=folder, redis_url=valkey_url)
    settings.run_dir.mkdir(parents=True)
    tracing = Tracing(SimpleSpanProcessor(spans))
    with running(settings, lambda settings: build_app(settings, tracing)) as system:
        yield system
    shutil.rmtree(folder)


def of(spans: InMemorySpanExporter, trace_id: int) -> dict[str, ReadableSpan]:
    return {s.name: s for s in spans.get_finished_spans() if s.context and s.context.trace_id == trace_id}


def test_a_streamed_completion_is_told_from_receive_to_stream(
    traced: System, spans: InMemorySpanExporter
) -> None:
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 5, "stream": True}
    with traced.http(traced.tenant("alice")) as client:
        answer = client.post("/v1/completions", json=body, headers={"traceparent": PARENT})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert answer.headers["traceparent"].split("-")[1] == PARENT.split("-")[1]
    trace_id = int(PARENT.split("-")[1], 16)
    until(lambda: "POST /v1/completions" in of(spans, trace_id))
    found = of(spans, trace_id)
    assert set(found) == {
        "POST /v1/completions",
        "auth",
        "receive",
        "queue",
        "prefill",
        "decode",
        "stream",
    }
    root = found.pop("POST /v1/completions")
    attributes: Any = root.attributes
    assert attributes["polypeft.request_id"] == answer.headers["x-request-id"]
    assert attributes["http.response.status_code"] == 200
    assert attributes["polypeft.tenant"].startswith("ten_")
    assert attributes["gen_ai.request.model"] == "toy"
    for child in found.values():
        assert child.parent == root.context
        assert (root.start_time or 0) - 5e6 <= (child.start_time or 0) <= (child.end_time or 0)
    assert all(PROMPT not in str(each.attributes) for each in spans.get_finished_spans())


def test_a_refusal_is_traced_too(traced: System, spans: InMemorySpanExporter) -> None:
    with traced.http("pp-" + "x" * 43) as client:
        answer = client.get("/v1/models")
    trace_id = int(answer.headers["traceparent"].split("-")[1], 16)
    until(lambda: "GET /v1/models" in of(spans, trace_id))
    found = of(spans, trace_id)
    assert set(found) == {"GET /v1/models", "auth"}
    attributes: Any = found["GET /v1/models"].attributes
    assert attributes["http.response.status_code"] == 401


def test_log_lines_of_a_request_name_it(traced: System, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((request_id.get(), record.getMessage()))

    async def broken(*_: object) -> None:
        raise ValueError(PROMPT)

    monkeypatch.setattr(traced.app.state.services.registry, "list", broken)
    listener = Listener()
    logging.getLogger("server.api").addHandler(listener)
    try:
        with traced.http(traced.tenant("bob")) as client:
            answers = [client.get("/v1/adapters") for _ in range(2)]
    finally:
        logging.getLogger("server.api").removeHandler(listener)
    assert [answer.status_code for answer in answers] == [500, 500]
    assert [id_ for id_, _ in seen] == [answer.headers["x-request-id"] for answer in answers]


def test_without_tracing_no_traceparent_comes_back(http: httpx.Client) -> None:
    assert "traceparent" not in http.get("/healthz", headers={"traceparent": PARENT}).headers
