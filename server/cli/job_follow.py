"""A job as it goes on, shown until it is over: a bar at a terminal, lines in a pipe; both on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from server.cli.http_client import answer
from server.cli.retry import AWAY, PATIENCE_SECONDS, RETRY_SECONDS, retry_while_away
from server.cli.sse import read_events
from server.logs import visible

SILENCE = httpx.Timeout(60.0, connect=5.0)  # the server says something every 15 seconds
LINE_SECONDS = 10  # between two lines on steps
STYLES = {"warn": "yellow", "error": "red"}


def follow(client: httpx.Client, job: str) -> dict[str, Any]:
    """The job, once it is over. Survives restarts of the server; raises Unavailable if it stays away."""
    console = Console(stderr=True, highlight=False)
    view = Bar(console) if console.is_interactive else Lines(console)
    with view.shown():
        for event in _events(client, job, view.away):
            view.event(event)
        path = f"/v1/fine_tuning/jobs/{job}"
        found: dict[str, Any] = retry_while_away(lambda: answer(client.get(path)), view.away)
    return found


def _events(client: httpx.Client, job: str, away: Callable[[Exception], None]) -> Iterator[dict[str, Any]]:
    """All there were and all to come, each once, over as many streams as it takes."""
    last, alive = "", time.monotonic()
    path = f"/v1/fine_tuning/jobs/{job}/events"
    while True:
        headers = {"Last-Event-ID": last} if last else {}
        opened = False
        try:
            with client.stream(
                "GET", path, params={"stream": "true"}, headers=headers, timeout=SILENCE
            ) as response:
                opened = response.is_success
                for event in read_events(response):
                    last = event.id
                    yield event.data
            return
        except AWAY as error:
            if opened:  # a stream that ends before its job is no news
                alive = time.monotonic()
            elif time.monotonic() - alive > PATIENCE_SECONDS:
                raise
            else:
                away(error)
        time.sleep(RETRY_SECONDS)


class Lines:
    """For a pipe: what happens, and how training stands every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said_at = 0
        self._away = False

    def shown(self) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self, event: dict[str, Any]) -> None:
        self._away = False
        data = event["data"] or {}
        if "train_loss" in data:
            due = event["created_at"] - self._said_at >= LINE_SECONDS or data["step"] == data["total_steps"]
            if not due:
                return
            self._said_at = event["created_at"]
        self._say(event["message"])

    def away(self, error: Exception) -> None:
        if not self._away:
            self._say(_gone(error))
        self._away = True

    def _say(self, text: str) -> None:
        self._console.print(visible(text), markup=False, soft_wrap=True)


class Bar:
    """For a terminal: one line that moves, and above it what happened."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # it all fits 80 columns
            TextColumn("{task.fields[figures]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._task: TaskID = self._progress.add_task("waiting", total=None, figures="")
        self._figures: dict[str, Any] = {}

    def shown(self) -> AbstractContextManager[object]:
        return self._progress

    def event(self, event: dict[str, Any]) -> None:
        data = event["data"] or {}
        if event["type"] == "metrics":
            self._figures |= data
        self._draw("training" if self._figures else "waiting")
        if "train_loss" not in data:
            style = STYLES.get(event["level"], "dim")
            self._progress.print(f"[{style}]{escape(visible(event['message']))}[/{style}]")

    def away(self, error: Exception) -> None:  # noqa: ARG002 - a bar has no room for reasons
        self._draw("[yellow]no answer[/yellow]")

    def _draw(self, description: str) -> None:
        step, total = self._figures.get("step"), self._figures.get("total_steps")
        if step and step == total and description == "training":
            description = "comparing"
        self._progress.update(
            self._task,
            description=description,
            total=total,
            completed=step or 0,
            figures=figures_line(self._figures),
            refresh=True,
        )


def figures_line(data: dict[str, Any]) -> str:
    """`45/180  1:20 left  loss 1.234  held out 1.301  310 tok/s`: of these, what is known."""
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


def _gone(error: Exception) -> str:
    return f"The server does not answer ({str(error) or type(error).__name__}); trying again."
