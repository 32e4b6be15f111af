"""`polypeft chat`: a conversation in the terminal, or over a pipe with one message a line."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, base_id, connection
from server.cli.sse import read_events
from server.logs import visible

Messages = list[dict[str, str]]


def chat(
    adapter: Annotated[str | None, typer.Option(help="The adapter to talk to; without it, the base.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest answer; else the context's rest.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Talk to the base or to one adapter. Ctrl-D ends it."""
    messages: Messages = [{"role": "system", "content": system}] if system else []
    with connection(url, key, data_dir) as client:
        options: dict[str, Any] = {"model": adapter or base_id(client), "temperature": temperature}
        if max_tokens is not None:
            options["max_tokens"] = max_tokens
        for line in _lines():
            messages.append({"role": "user", "content": line})
            text = ""
            for piece in _stream_answer(client, {**options, "messages": messages, "stream": True}):
                typer.echo(visible(piece, keep="\n\t"), nl=False)
                text += piece
            typer.echo()
            messages.append({"role": "assistant", "content": text})


def _lines() -> Iterator[str]:
    """The user's messages, typed at a prompt or read from a pipe; empty lines are skipped."""
    console = Console(stderr=True)
    while True:
        try:
            line = console.input("[bold]> [/bold]") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()


def _stream_answer(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of text of a streamed answer. Raises the server's error, also within the stream."""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for event in read_events(response):
            for choice in event.data.get("choices", []):
                yield choice["delta"].get("content") or ""
