"""A job's events over streams that break, and how they look."""

import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from rich.console import Console

from server.cli import job_follow, retry
from server.cli.job_follow import Bar, Lines, progress_line
from server.cli.retry import retry_while_away
from server.cli.sse import read_events
from server.errors import NotFound, Unavailable

Answer = httpx.Response | Exception


def event(number: int, message: str = "", **data: Any) -> dict[str, Any]:
    kind = "metrics" if data else "message"
    common = {"id": f"e-{number}", "level": "info", "created_at": number, "type": kind}
    return common | {"message": message or f"event {number}", "data": data or None}


def stream(*numbers: int, end: str = "data: [DONE]\n\n") -> httpx.Response:
    lines = [f"id: e-{number}\ndata: {json.dumps(event(number))}\n\n" for number in numbers]
    return event_stream(KEEP_ALIVE + KEEP_ALIVE.join(lines) + end)


def event_stream(content: str) -> httpx.Response:
    return httpx.Response(200, text=content, headers={"content-type": "text/event-stream"})


def error(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": f"It is {code}."}})


KEEP_ALIVE = ": keep-alive\n\n"
ENDED = 'data: {"error": {"code": "unavailable", "message": "Come again."}}\n\n'


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_follow, "RETRY_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(retry, "RETRY_INTERVAL_SECONDS", 0.0)


@pytest.fixture
def server() -> Callable[..., tuple[httpx.Client, list[str]]]:
    """A server that gives these answers in turn; what each request named as the last event."""

    def make(*answers: Answer) -> tuple[httpx.Client, list[str]]:
        ahead, asked = list(answers), list[str]()

        def handle(request: httpx.Request) -> httpx.Response:
            asked.append(request.headers.get("last-event-id", ""))
            given = ahead.pop(0)
            if isinstance(given, Exception):
                raise given
            return given

        return httpx.Client(transport=httpx.MockTransport(handle), base_url="http://server"), asked

    return make


def test_each_event_comes_once_over_broken_streams_and_restarts(server: Callable[..., Any]) -> None:
    client, asked = server(
        stream(1, 2, end=""),  # cut
        httpx.ConnectError("refused"),
        error(503, "unavailable"),
        httpx.Response(502, text="<html>a proxy's</html>"),
        stream(3, end=ENDED),  # the longest that a stream may be
        stream(4),
    )
    away: list[Exception] = []
    seen = [found["id"] for found in job_follow._events(client, "ftjob-1", away.append)]
    assert seen == ["e-1", "e-2", "e-3", "e-4"]
    assert asked == ["", "e-2", "e-2", "e-2", "e-2", "e-3"]
    assert [str(fault) for fault in away] == ["refused", "It is unavailable.", "The server answered 502."]


def test_unicode_line_separators_within_a_text_end_no_line() -> None:
    text = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    events = read_events(event_stream(f"data: {text}\n\ndata: [DONE]\n\n"))
    assert [found.data for found in events] == [{"text": "a\u2028b\x85c"}]


def test_what_is_no_event_stream_or_ends_early_is_unavailable() -> None:
    for answer in (
        httpx.Response(200, text="<html>a proxy's</html>"),
        event_stream('data: {"text": "a"}\n\n'),
    ):
        with pytest.raises(Unavailable, match="was cut"):
            list(read_events(answer))


def test_a_server_that_stays_away_is_given_up(
    server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_follow, "RETRY_FOR_SECONDS", 0.0)
    client, _ = server(stream(1, end=""), httpx.ConnectError("refused"), stream(2))
    seen = []
    with pytest.raises(httpx.ConnectError):
        seen += [found["id"] for found in job_follow._events(client, "ftjob-1", lambda _: None)]
    monkeypatch.setattr(retry, "RETRY_FOR_SECONDS", 0.0)
    with pytest.raises(httpx.ConnectError):
        retry_while_away(lambda: server(httpx.ConnectError("refused"))[0].get("/"), lambda _: None)


def test_a_job_that_is_gone_is_no_reason_to_wait(server: Callable[..., Any]) -> None:
    client, asked = server(error(404, "not_found"))
    with pytest.raises(NotFound):
        list(job_follow._events(client, "ftjob-1", lambda _: None))
    assert len(asked) == 1


def test_a_call_is_made_again_until_the_server_is_back() -> None:
    answers: list[Exception | int] = [httpx.ReadError("reset"), Unavailable("draining"), 7]
    away: list[str] = []

    def call() -> int:
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    assert retry_while_away(call, lambda fault: away.append(str(fault))) == 7
    assert away == ["reset"]


def test_steps_are_lines_every_few_seconds_in_a_pipe() -> None:
    said = io.StringIO()
    lines = Lines(Console(file=said))
    lines.event(event(0, "[red]Created[/red] \x1b[2J"))
    for step in range(1, 26):
        lines.event(event(step, f"Step {step}/25", step=step, total_steps=25, train_loss=1.0))
    lines.away(httpx.ConnectError("refused"))
    lines.away(httpx.ConnectError("refused"))
    lines.event(event(26, "The job has successfully completed"))
    assert said.getvalue().splitlines() == [
        "[red]Created[/red] \\x1b[2J",
        "Step 10/25",
        "Step 20/25",
        "Step 25/25",
        "The server does not answer (refused); trying again.",
        "The job has successfully completed",
    ]


def test_a_bar_shows_where_training_stands() -> None:
    said = io.StringIO()
    bar = Bar(Console(file=said, force_terminal=True, width=80, highlight=False))
    with bar.shown():
        bar.event(event(1, "[red]Created[/red]"))
        figures = {
            "step": 45,
            "total_steps": 180,
            "train_loss": 1.25,
            "trained_tokens": 3100,
            "seconds": 10.0,
        }
        bar.event(event(2, "Step 45/180", **figures))
        bar.event(event(3, "Step 45: validation loss=1.5", step=45, valid_loss=1.5))
        bar.away(httpx.ConnectError("refused"))
        bar.event(event(4, "Step 180/180", **(figures | {"step": 180, "seconds": 40.0})))
    text = said.getvalue()
    assert "45/180  0:30 left  loss 1.250  held out 1.500  310 tok/s" in text
    told = ("[red]Created[/red]", "Step 45: validation loss=1.5", "no answer", "comparing", "0:00 left")
    for shown in told:
        assert shown in text
    assert "Step 45/180" not in text


def test_only_what_is_known_is_shown() -> None:
    assert progress_line({}) == ""
    assert progress_line({"step": 1, "total_steps": 2, "train_loss": 0.5}) == "1/2  loss 0.500"
