"""`polypeft audit`: who changed what, when, from where, and with which outcome."""

import time
from typing import Annotated, Any, Literal

import typer

from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, connection, pages, refusal
from server.cli.keys import date_of, seconds_in
from server.cli.output import print_table

COLUMNS = ("time", "tenant", "actor", "action", "target", "outcome", "address")


def audit(
    own: Annotated[
        bool, typer.Option("--own", help="The log of the tenant whose key is sent, not of all (operator).")
    ] = False,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's, or `operator`.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only of this key, by its id.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this: key.create; `key.` for all of keys.")] = None,
    outcome: Annotated[str | None, typer.Option(help="done, refused, failed or unknown.")] = None,
    since: Annotated[str | None, typer.Option(help="How far back.", metavar="30d|12h|10m")] = None,
    format_: Annotated[
        Literal["table", "jsonl", "csv"], typer.Option("--format", help="jsonl and csv have every field.")
    ] = "table",
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """The audit log, newest first."""
    path = "/v1/audit" if own else "/admin/audit"
    given = {"tenant": tenant, "actor": actor, "action": action, "outcome": outcome}
    params = {name: value for name, value in given.items() if value is not None}
    if since is not None:
        params["since"] = str(time.time() - seconds_in(since, "--since"))
    with connection(url, key, data_dir) as client:
        if format_ == "table":
            rows = (_row(entry) for entry in pages(client, path, **params, limit="1000"))
            print_table(COLUMNS, rows)
            return
        with client.stream("GET", path, params=params | {"format": format_}) as response:
            if not response.is_success:
                raise refusal(response.read(), f"The server answered {response.status_code}.")
            for line in response.iter_lines():
                typer.echo(line)


def _row(entry: dict[str, Any]) -> list[str]:
    return [date_of(entry["time"]), *(str(entry[column]) or "-" for column in COLUMNS[1:])]
