"""`polypeft complete`: the base or an adapter completes a text."""

import sys
from typing import Annotated

import typer

from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, base_id, connection
from server.cli.sse import read_events
from server.logs import visible


def complete(
    text: Annotated[str | None, typer.Argument(help="The text; without it, stdin.")] = None,
    adapter: Annotated[str | None, typer.Option(help="The adapter to ask; without it, the base.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Go on with a text as it stands, without the marks of a conversation around it."""
    prompt = sys.stdin.read().removesuffix("\n") if text is None else text
    with connection(url, key, data_dir) as client:
        body = {
            "model": adapter or base_id(client),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        with client.stream("POST", "/v1/completions", json=body) as response:
            for event in read_events(response):
                for choice in event.data.get("choices", []):
                    typer.echo(visible(choice["text"], keep="\n\t"), nl=False)
    typer.echo()
