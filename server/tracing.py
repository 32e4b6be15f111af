"""OpenTelemetry traces of requests: their phases, tenant and adapters.

OpenTelemetry is imported only with --otlp-endpoint (and `polypeft[otel]`); for a request without a trace
`span` does nothing. The engine has no tracing: it reports a row's times with the row's first token
(messages.Timing), and RowTrace makes spans of them. docs/traces.md lists all spans.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from server.errors import StartupError
from server.messages import Generate, Timing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span, Tracer

NS = 1_000_000_000
Attributes = Mapping[str, str | int | float | bool]

_current: ContextVar["Trace | None"] = ContextVar("trace", default=None)


class Tracing:
    """Starts traces. `close` sends the spans that are still queued."""

    def __init__(self, processor: "SpanProcessor", share: float = 1.0) -> None:
        """`share` of the requests without a traceparent are traced; for others its flag decides."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        resource = Resource.create({"service.name": "polypeft"})
        self._provider = TracerProvider(ParentBased(TraceIdRatioBased(share)), resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("polypeft")

    @classmethod
    def to(cls, endpoint: str, share: float) -> "Tracing":
        """Send spans to a collector (OTLP over HTTP). Raises StartupError if the extra is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise StartupError("otlp_endpoint needs OpenTelemetry: pip install 'polypeft[otel]'.") from error
        return cls(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")), share)

    def begin(self, method: str, headers: Sequence[tuple[bytes, bytes]], request_id: str) -> "Trace":
        """The trace of a new request, which continues that of its `traceparent`, if it has a valid one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        wanted = (b"traceparent", b"tracestate")
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in wanted}
        context = TraceContextTextMapPropagator().extract(carrier)
        attributes = {"http.request.method": method, "polypeft.request_id": request_id}
        root = self._tracer.start_span(method, context, SpanKind.SERVER, attributes)
        return Trace(self._tracer, root)

    def close(self) -> None:
        self._provider.shutdown()


class Trace:
    """The trace of one request: a root span for the whole request, and a child for each phase."""

    def __init__(self, tracer: "Tracer", root: "Span") -> None:
        self._tracer = tracer
        self._root = root
        self._first_byte = 0.0

    @property
    def traceparent(self) -> str:
        """The root span in W3C's format, for the answer's header."""
        context = self._root.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def add(self, name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
        """Add a child span from `start` to `end`, in Unix seconds."""
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._root)
        child = self._tracer.start_span(
            name, context, attributes=dict(attributes or {}), start_time=int(start * NS)
        )
        child.end(int(max(start, end) * NS))

    def annotate(self, attributes: Attributes) -> None:
        """Set attributes of the root span."""
        self._root.set_attributes(attributes)

    def sent(self, *, more: bool) -> None:
        """A part of the body was sent. The span `stream` is from the first of several parts to the last."""
        now = time.time()
        if not self._first_byte:
            self._first_byte = now if more else 0.0
        elif not more:
            self.add("stream", self._first_byte, now)

    def end(self, method: str, route: str, status: int) -> None:
        from opentelemetry.trace import StatusCode

        self._root.update_name(f"{method} {route}")
        self._root.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500 or status == 0:
            self._root.set_status(StatusCode.ERROR)
        self._root.end()


def use_trace(trace: Trace | None) -> None:
    """Make it the trace of the current task and of the tasks that it starts."""
    _current.set(trace)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Record the block as a span of the current request, if that is traced."""
    trace = _current.get()
    if trace is None:
        yield
        return
    start = time.time()
    try:
        yield
    finally:
        trace.add(name, start, time.time())


def annotate(attributes: Attributes) -> None:
    """Set attributes of the current request's root span, if it is traced."""
    if trace := _current.get():
        trace.annotate(attributes)


class RowTrace:
    """The spans of one row in the engine."""

    def __init__(self, row: Generate, choice: int) -> None:
        self._trace = _current.get()
        self._timing: Timing | None = None
        self._attributes: dict[str, Any] = {"polypeft.choice": choice}
        if self._trace is not None:
            uses = [row.adapter] if row.adapter else [use.adapter for use in row.adapters]
            self._attributes["polypeft.tenant"] = row.tenant
            self._attributes["polypeft.adapter"] = ",".join(f"{ref.name}@{ref.version}" for ref in uses)

    def first_token(self, timing: Timing) -> None:
        """Make spans of the times that came with the row's first token."""
        self._timing = timing
        if self._trace is None or not timing.started:
            return
        source = {"polypeft.adapter_source": timing.source} if timing.source else {}
        waits = {f"polypeft.wait.{reason}": seconds for reason, seconds in timing.waited.items()}
        self._trace.add("queue", timing.arrived, timing.started, self._attributes | waits)
        if timing.load:
            self._trace.add("adapter load", *timing.load, self._attributes | source)
        self._trace.add("prefill", timing.started, timing.first_token, self._attributes | source)

    def finish(self, tokens: int) -> None:
        """The row has ended, after `tokens` tokens."""
        if self._trace is not None and self._timing is not None:
            attributes = self._attributes | {"gen_ai.usage.output_tokens": tokens}
            self._trace.add("decode", self._timing.first_token, time.time(), attributes)
