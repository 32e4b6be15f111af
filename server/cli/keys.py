"""What commands do with API keys, over the routes of a tenant's own keys or of the operator's."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any

import httpx
import typer

from server.cli.http_client import answer

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Name = Annotated[str | None, typer.Option("--name", help="What to call the key; only ever shown.")]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", help="inference, adapters, fine-tune or read; repeat it. Without it: all."),
]
ExpiresIn = Annotated[
    str | None, typer.Option("--expires-in", help="How long the key is valid.", metavar="30d|12h|10m|60s")
]
Addresses = Annotated[
    list[str] | None,
    typer.Option("--address", help="Network that requests may come from; repeat it.", metavar="CIDR"),
]
Overlap = Annotated[
    str, typer.Option("--overlap", help="How long the old secret stays valid.", metavar="30d|12h|10m|0s")
]
KeyId = Annotated[str, typer.Argument(help="The key's id, as the list of keys shows it.")]


def route_of(tenant: str | None) -> str:
    """Of the tenant's keys, for the operator; without a tenant, of those of the tenant that asks."""
    return "/v1/keys" if tenant is None else f"/admin/tenants/{tenant}/keys"


def make_key(
    client: httpx.Client,
    route: str,
    name: str | None,
    scopes: list[str] | None,
    expires_in: str | None,
    addresses: list[str] | None,
) -> None:
    """Make a key and show its secret."""
    body = {
        "name": name,
        "scopes": scopes or None,
        "expires_in": None if expires_in is None else seconds_in(expires_in, "--expires-in"),
        "addresses": addresses or None,
    }
    show_secret(answer(client.post(route, json=body)))


def rotate_key(client: httpx.Client, route: str, key_id: str, overlap: str) -> None:
    """Give the key a new secret and show it."""
    body = {"overlap_seconds": seconds_in(overlap, "--overlap")}
    show_secret(answer(client.post(f"{route}/{key_id}/rotate", json=body)))


def revoke_key(client: httpx.Client, route: str, key_id: str) -> None:
    answer(client.delete(f"{route}/{key_id}"))
    typer.echo(f"{key_id} is revoked.")


def show_secret(key: dict[str, Any]) -> None:
    typer.echo(f"id      {key['id']}\nsecret  {key['secret']}")


def seconds_in(text: str, option: str) -> int:
    """A time such as 30d, 12h, 10m or 60s."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{option} must be a time such as 30d, 12h, 10m or 60s, not {text!r}.")
    return int(found[1]) * UNITS[found[2]]


def date_of(seconds: float | None) -> str:
    """Unix seconds for people, in UTC; "-" for none."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
