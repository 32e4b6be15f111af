"""`polypeft tenants limits`: what a tenant, one of its keys or one of its adapters may use."""

from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection
from server.cli.output import print_table
from server.errors import PreconditionFailed

TRIES = 10  # of a change that others made way for
WORDS = ("priority",)  # limits that are no number

Changes = dict[str, int | str | None]


def _limit(what: str, metavar: str = "N|default") -> Any:
    return typer.Option(help=f"{what}, or `default`.", metavar=metavar, show_default=False)


def limits(
    tenant: Annotated[str, typer.Argument(help="The tenant's id, as `tenants list` shows it.")],
    key_id: Annotated[str | None, typer.Option(help="Of this key alone: the first five limits.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Of this adapter alone: the first five.")] = None,
    requests_per_minute: Annotated[str | None, _limit("Generation requests a minute")] = None,
    tokens_per_minute: Annotated[str | None, _limit("Tokens a minute, prompts and answers")] = None,
    concurrent_requests: Annotated[str | None, _limit("Generation requests at once")] = None,
    max_context: Annotated[str | None, _limit("Tokens of prompt and answer together")] = None,
    max_n: Annotated[str | None, _limit("Choices of a request")] = None,
    queued_tokens: Annotated[str | None, _limit("Tokens of requests that wait for their first")] = None,
    adapters: Annotated[str | None, _limit("Adapters to keep")] = None,
    adapter_bytes: Annotated[str | None, _limit("Bytes of their versions")] = None,
    file_bytes: Annotated[str | None, _limit("Bytes of files to keep")] = None,
    jobs: Annotated[str | None, _limit("Fine-tuning jobs that have not ended")] = None,
    training_tokens_per_day: Annotated[str | None, _limit("Tokens that jobs train on in a day")] = None,
    priority: Annotated[
        str | None, _limit("The most urgent class of requests", "interactive|standard|batch|default")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Show a tenant's limits; change those that are given, at once and without a restart."""
    if key_id is not None and adapter is not None:
        raise typer.BadParameter("--key-id and --adapter: name one of them.")
    options = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
        "max_context": max_context,
        "max_n": max_n,
        "queued_tokens": queued_tokens,
        "adapters": adapters,
        "adapter_bytes": adapter_bytes,
        "file_bytes": file_bytes,
        "jobs": jobs,
        "training_tokens_per_day": training_tokens_per_day,
        "priority": priority,
    }
    changes = {name: _value(name, value) for name, value in options.items() if value is not None}
    of = f"/keys/{quote(key_id, '')}" if key_id else f"/adapters/{quote(adapter, '')}" if adapter else ""
    with connection(url, key, data_dir) as client:
        shown = _changed(client, f"/admin/tenants/{quote(tenant, '')}{of}/limits", changes)
    rows = (
        (name, "default" if value is None else value, _or_none(shown["in_force"][name]))
        for name, value in shown["set"].items()
    )
    print_table(["limit", "set", "in force"], rows)


def _changed(client: httpx.Client, route: str, changes: Changes) -> dict[str, Any]:
    """The limits after the changes, which undo nobody else's: if there were any, all is read again."""
    for left in reversed(range(TRIES)):
        read = client.get(route)
        shown: dict[str, Any] = answer(read)
        if not changes:
            return shown
        written = client.put(
            route, json=shown["set"] | changes, headers={"If-Match": read.headers.get("etag", "*")}
        )
        if written.status_code != PreconditionFailed.status or not left:
            shown = answer(written)
            break
    return shown


def _value(name: str, value: str) -> int | str | None:
    """A limit as the server takes it, which checks its range; None for the default."""
    if value == "default":
        return None
    if name in WORDS:
        return value
    try:
        return int(value)
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise typer.BadParameter(f"{option} must be a whole number or `default`, not {value!r}.") from None


def _or_none(value: int | str | None) -> int | str:
    return "none" if value is None else value
