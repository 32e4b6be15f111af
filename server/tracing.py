"""Traces of requests for an OpenTelemetry collector: where each one's time went, whose, for which adapter.

Nothing of OpenTelemetry is imported unless traces are wanted (`polypeft[otel]` and --otlp-endpoint), and
without a trace under way `span` does nothing. The engine knows no traces: it tells a row's times with its
first token, and they become spans here.
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

_under_way: ContextVar["Trace | None"] = ContextVar("trace", default=None)


class Tracing:
    """Makes traces. `close` sends what is left."""

    def __init__(self, processor: "SpanProcessor", share: float = 1.0) -> None:
        """Of requests without a traceparent, `share` are traced; one that has it is as its flag says."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        resource = Resource.create({"service.name": "polypeft"})
        self._provider = TracerProvider(ParentBased(TraceIdRatioBased(share)), resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("polypeft")

    @classmethod
    def to(cls, endpoint: str, share: float) -> "Tracing":
        """Send them to a collector (OTLP over HTTP). Raises StartupError without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise StartupError("otlp_endpoint needs OpenTelemetry: pip install 'polypeft[otel]'.") from error
        return cls(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")), share)

    def begin(self, method: str, headers: Sequence[tuple[bytes, bytes]], request_id: str) -> "Trace":
        """A request has arrived; it goes on the trace that its `traceparent` names, if it has a sound one."""
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
    """One request's: a root that lasts as long as the request, and a span for each thing it went through."""

    def __init__(self, tracer: "Tracer", root: "Span") -> None:
        self._tracer = tracer
        self._root = root
        self._first_byte = 0.0

    @property
    def traceparent(self) -> str:
        """The root in W3C's form, for the answer's header."""
        context = self._root.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def add(self, name: str, start: float, end: float, attributes: Attributes | None = None) -> None:
        """A child from `start` to `end`, Unix seconds."""
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._root)
        child = self._tracer.start_span(
            name, context, attributes=dict(attributes or {}), start_time=int(start * NS)
        )
        child.end(int(max(start, end) * NS))

    def tell(self, attributes: Attributes) -> None:
        """Something about the whole request."""
        self._root.set_attributes(attributes)

    def sent(self, *, more: bool) -> None:
        """A piece of the body has gone out. The time from the first to the last of several is `stream`."""
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


def follow(trace: Trace | None) -> None:
    """From here on the running task, and those it starts, are about this request."""
    _under_way.set(trace)


@contextmanager
def span(name: str) -> Iterator[None]:
    """The block as a span of the request under way, if it is traced."""
    trace = _under_way.get()
    if trace is None:
        yield
        return
    start = time.time()
    try:
        yield
    finally:
        trace.add(name, start, time.time())


def tell(attributes: Attributes) -> None:
    """Something about the request under way, if it is traced."""
    if trace := _under_way.get():
        trace.tell(attributes)


class RowTrace:
    """One row's way through the engine, as spans."""

    def __init__(self, row: Generate, choice: int) -> None:
        self._trace = _under_way.get()
        self._timing: Timing | None = None
        self._attributes: dict[str, Any] = {"polypeft.choice": choice}
        if self._trace is not None:
            uses = [row.adapter] if row.adapter else [use.adapter for use in row.adapters]
            self._attributes["polypeft.tenant"] = row.tenant
            self._attributes["polypeft.adapter"] = ",".join(f"{ref.name}@{ref.version}" for ref in uses)

    def first_token(self, timing: Timing) -> None:
        """The engine's times of the row."""
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
        if self._trace is not None and self._timing is not None:
            counted = self._attributes | {"gen_ai.usage.output_tokens": tokens}
            self._trace.add("decode", self._timing.first_token, time.time(), counted)
