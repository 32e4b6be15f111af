"""Traces: nothing without the extra; with it, each request's way as spans, told by real requests."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.errors import StartupError
from server.messages import AdapterRef, Generate, Sampling, Timing
from server.tracing import RowTrace, Tracing, annotate, span, use_trace

ROOT = str(Path(__file__).resolve().parents[2])
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Iterator[Tracing]:
    tracing = Tracing(SimpleSpanProcessor(spans))
    yield tracing
    use_trace(None)
    tracing.close()


def named(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {found.name: found for found in spans.get_finished_spans()}


def seconds(found: ReadableSpan) -> float:
    assert found.start_time is not None
    assert found.end_time is not None
    return (found.end_time - found.start_time) / 1e9


def test_without_a_trace_nothing_is_imported_and_nothing_happens() -> None:
    code = """
import sys
from server.tracing import RowTrace, annotate, span
with span("auth"):
    annotate({"polypeft.tenant": "t"})
assert not [name for name in sys.modules if name.startswith("opentelemetry")], "imported for nothing"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": ROOT})


def test_without_the_extra_the_start_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(StartupError, match=r"polypeft\[otel\]"):
        Tracing.to("http://127.0.0.1:4318", 1.0)


def test_a_request_goes_on_the_trace_it_came_with(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    trace = tracing.begin("POST", [(b"traceparent", PARENT.encode()), (b"host", b"x")], "req_1")
    assert trace.traceparent.split("-")[1] == PARENT.split("-")[1]
    assert trace.traceparent.split("-")[2] != PARENT.split("-")[2], "a span of our own"
    trace.end("POST", "/v1/completions", 200)
    (root,) = spans.get_finished_spans()
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert root.name == "POST /v1/completions"


@pytest.mark.parametrize("header", [b"", b"00-0-0-01", b"\xff\xfe", PARENT.encode() * 100])
def test_a_traceparent_that_is_none_begins_a_trace(
    tracing: Tracing, spans: InMemorySpanExporter, header: bytes
) -> None:
    tracing.begin("GET", [(b"traceparent", header)], "req_1").end("GET", "/x", 200)
    assert spans.get_finished_spans()[0].parent is None


def test_of_requests_without_one_a_share_is_traced(spans: InMemorySpanExporter) -> None:
    tracing = Tracing(SimpleSpanProcessor(spans), share=0.0)
    tracing.begin("GET", [], "req_1").end("GET", "/x", 200)
    assert not spans.get_finished_spans()
    tracing.begin("GET", [(b"traceparent", PARENT.encode())], "req_2").end("GET", "/x", 200)
    assert len(spans.get_finished_spans()) == 1
    tracing.close()


def test_the_engines_times_become_spans(tracing: Tracing, spans: InMemorySpanExporter) -> None:
    trace = tracing.begin("POST", [], "req_1")
    use_trace(trace)
    ref = AdapterRef("ten_1", "poet", 3, "d" * 64, "lora", "")
    row = RowTrace(Generate("r", "ten_1", [1], Sampling(max_tokens=2), ref), 0)
    now = time.time()
    row.first_token(
        Timing(
            now - 5, now - 2, now - 1, 3.0, {"adapter": 2.5, "capacity": 0.5}, "disk", (now - 5, now - 2.5)
        )
    )
    row.finish(2)
    trace.end("POST", "/x", 500)
    found = named(spans)
    assert {"queue", "adapter load", "prefill", "decode", "POST /x"} == set(found)
    lengths = {
        name: round(seconds(found[name]), 2) for name in ("queue", "adapter load", "prefill", "decode")
    }
    assert lengths == {
        "queue": 3.0,
        "adapter load": 2.5,
        "prefill": 1.0,
        "decode": pytest.approx(1.0, abs=0.5),
    }
    attributes: Any = found["adapter load"].attributes
    assert attributes["polypeft.adapter"] == "poet@3"
    assert attributes["polypeft.tenant"] == "ten_1"
    assert attributes["polypeft.adapter_source"] == "disk"
    root = found["POST /x"]
    assert all(child.parent == root.context for child in found.values() if child is not root)
    assert root.status.is_ok is False


def test_requests_under_way_at_once_keep_their_spans_apart(
    tracing: Tracing, spans: InMemorySpanExporter
) -> None:
    async def request(number: int) -> None:
        trace = tracing.begin("GET", [], f"req_{number}")
        use_trace(trace)
        with span(f"work {number}"):
            await asyncio.sleep(0.001)
        annotate({"polypeft.tenant": f"ten_{number}"})
        trace.end("GET", f"/{number}", 200)

    async def both() -> None:
        await asyncio.gather(request(1), request(2))

    asyncio.run(both())
    found = named(spans)
    for number in (1, 2):
        assert found[f"work {number}"].parent == found[f"GET /{number}"].context
        attributes: Any = found[f"GET /{number}"].attributes
        assert attributes["polypeft.tenant"] == f"ten_{number}"
