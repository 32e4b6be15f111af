"""Shows a running job until it ends: a progress bar at a terminal, lines in a pipe; both on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from server.cli.http_client import answer
from server.cli.retry import RETRY_FOR_SECONDS, RETRY_INTERVAL_SECONDS, SERVER_AWAY, retry_while_away
from server.cli.sse import read_events
from server.logs import visible

STREAM_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # the server sends a keep-alive every 15 seconds
STEP_LINE_SECONDS = 10  # between two lines about steps
STYLES = {"warn": "yellow", "error": "red"}


def follow(client: httpx.Client, job: str) -> dict[str, Any]:
    """Show the job until it ends; returns it. Survives restarts of the server.

    Raises Unavailable or httpx.TransportError if the server stays away.
    """
    console = Console(stderr=True, highlight=False)
    view = Bar(console) if console.is_interactive else Lines(console)
    with view.shown():
        for event in _events(client, job, view.away):
            view.event(event)
        path = f"/v1/fine_tuning/jobs/{job}"
        ended: dict[str, Any] = retry_while_away(lambda: answer(client.get(path)), view.away)
    return ended


def _events(client: httpx.Client, job: str, on_away: Callable[[Exception], None]) -> Iterator[dict[str, Any]]:
    """All events of the job, past and future, each once, over as many streams as it takes."""
    last_id, last_stream_at = "", time.monotonic()
    path = f"/v1/fine_tuning/jobs/{job}/events"
    while True:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        opened = False
        try:
            with client.stream(
                "GET", path, params={"stream": "true"}, headers=headers, timeout=STREAM_TIMEOUT
            ) as response:
                opened = response.is_success
                for event in read_events(response):
                    last_id = event.id
                    yield event.data
            return
        except SERVER_AWAY as error:
            if opened:  # streams may end before their job: reconnect
                last_stream_at = time.monotonic()
            elif time.monotonic() - last_stream_at > RETRY_FOR_SECONDS:
                raise
            else:
                on_away(error)
        time.sleep(RETRY_INTERVAL_SECONDS)


class Lines:
    """For a pipe: a line for each event, those of training steps at most every STEP_LINE_SECONDS."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_step_line_at = 0
        self._away = False

    def shown(self) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self, event: dict[str, Any]) -> None:
        self._away = False
        data = event.get("data") or {}  # an older server sends null
        if "train_loss" in data:
            due = (
                event["created_at"] - self._last_step_line_at >= STEP_LINE_SECONDS
                or data["step"] == data["total_steps"]
            )
            if not due:
                return
            self._last_step_line_at = event["created_at"]
        self._print(event["message"])

    def away(self, error: Exception) -> None:
        if not self._away:
            self._print(_away_sentence(error))
        self._away = True

    def _print(self, text: str) -> None:
        self._console.print(visible(text), markup=False, soft_wrap=True)


class Bar:
    """For a terminal: a progress bar, with the other events above it."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # so that the line fits 80 columns
            TextColumn("{task.fields[metrics]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._task: TaskID = self._progress.add_task("waiting", total=None, metrics="")
        self._metrics: dict[str, Any] = {}

    def shown(self) -> AbstractContextManager[object]:
        return self._progress

    def event(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}  # an older server sends null
        if event["type"] == "metrics":
            self._metrics |= data
        self._draw("training" if self._metrics else "waiting")
        if "train_loss" not in data:
            style = STYLES.get(event["level"], "dim")
            self._progress.print(f"[{style}]{escape(visible(event['message']))}[/{style}]")

    def away(self, error: Exception) -> None:  # noqa: ARG002 - a bar has no room for reasons
        self._draw("[yellow]no answer[/yellow]")

    def _draw(self, description: str) -> None:
        step, total = self._metrics.get("step"), self._metrics.get("total_steps")
        if step and step == total and description == "training":
            description = "comparing"
        self._progress.update(
            self._task,
            description=description,
            total=total,
            completed=step or 0,
            metrics=progress_line(self._metrics),
            refresh=True,
        )


def progress_line(data: dict[str, Any]) -> str:
    """`45/180  1:20 left  loss 1.234  held out 1.301  310 tok/s`, without the parts that are unknown."""
    if "train_loss" not in data:
        return ""
    step, total, seconds = data["step"], data["total_steps"], data.get("seconds")
    parts = [f"{step}/{total}"]
    if seconds:
        left = round(seconds / step * (total - step))
        parts.append(f"{left // 60}:{left % 60:02} left")
    parts.append(f"loss {data['train_loss']:.3f}")
    if "valid_loss" in data:
        parts.append(f"held out {data['valid_loss']:.3f}")
    if seconds:
        parts.append(f"{data['trained_tokens'] / seconds:.0f} tok/s")
    return "  ".join(parts)


def _away_sentence(error: Exception) -> str:
    return f"The server does not answer ({str(error) or type(error).__name__}); trying again."
