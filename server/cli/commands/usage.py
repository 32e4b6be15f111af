"""`polypeft usage`: what a tenant used, day by day; with the operator's key, what all of them did."""

from typing import Annotated, Any

import httpx
import typer

from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection
from server.cli.output import print_table

COLUMNS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
    "loads",
    "training_tokens",
)


def usage(
    start: Annotated[str | None, typer.Option(help="The first day, YYYY-MM-DD (UTC).")] = None,
    end: Annotated[str | None, typer.Option(help="The day after the last.")] = None,
    by: Annotated[str, typer.Option(help="What to group by beside the day: adapter,key,tenant.")] = "",
    tenant: Annotated[str | None, typer.Option(help="This tenant alone (operator).")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="All columns, as CSV.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """What was used, day by day: by a tenant with its --key, else by all (operator). By default, a week."""
    route = "/v1/usage" if key else "/admin/usage"
    given = {"start": start, "end": end, "group_by": by or None, "tenant": tenant, "limit": "31"}
    params = {name: value for name, value in given.items() if value is not None}
    with connection(url, key, data_dir) as client:
        if csv:
            _print_csv(client, route, params)
        else:
            print_table(("date", "tenant", "adapter", "key", *COLUMNS), _rows(client, route, params))


def _rows(client: httpx.Client, route: str, params: dict[str, str]) -> list[list[Any]]:
    rows, page = [], params
    while True:
        found = answer(client.get(route, params=page))
        for bucket in found["data"]:
            for result in bucket["results"]:
                names = [result[name] or "" for name in ("project_id", "model", "api_key_id")]
                rows.append([bucket["date"], *names, *(result[column] for column in COLUMNS)])
        if not found["has_more"]:
            return rows
        page = params | {"page": found["next_page"]}


def _print_csv(client: httpx.Client, route: str, params: dict[str, str]) -> None:
    page: dict[str, str] | None = params | {"format": "csv"}
    first = True
    while page is not None:
        response = client.get(route, params=page)
        if not response.is_success:
            answer(response)  # raises the server's sentence
        head, _, rest = response.text.partition("\n")
        typer.echo(f"{head}\n{rest}" if first else rest, nl=False)
        first = False
        following = response.headers.get("x-next-page")
        page = None if following is None else page | {"page": following}
