"""`polypeft tenants`: tenants, their API keys and limits. Needs the operator's key."""

from typing import Annotated, Any

import typer

from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection
from server.cli.keys import (
    Addresses,
    ExpiresIn,
    KeyId,
    Name,
    Overlap,
    Scopes,
    make_key,
    revoke_key,
    rotate_key,
    route_of,
)
from server.cli.output import print_table

tenants = typer.Typer(help="Tenants, their keys and limits (operator).", no_args_is_help=True)

Tenant = Annotated[str, typer.Argument(help="The tenant's id, as `tenants list` shows it.")]


@tenants.command()
def add(
    name: Annotated[str, typer.Argument(help="What to call it; only ever shown.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Make a tenant and its first key. The key is shown once."""
    with connection(url, key, data_dir) as client:
        created = answer(client.post("/admin/tenants", json={"name": name}))
    typer.echo(f"id   {created['id']}\nkey  {created['key']}")


@tenants.command("list")
def list_(url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """All tenants, oldest first."""
    with connection(url, key, data_dir) as client:
        all_tenants = answer(client.get("/admin/tenants"))["data"]
    print_table(["id", "name"], ((tenant["id"], tenant["name"]) for tenant in all_tenants))


@tenants.command()
def keys(
    tenant: Tenant,
    new: Annotated[bool, typer.Option("--new", help="Make another key; it is shown once.")] = False,
    name: Name = None,
    scope: Scopes = None,
    expires_in: ExpiresIn = None,
    address: Addresses = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """The ids of a tenant's keys; `polypeft keys list --tenant` shows more."""
    if not new and (name or scope or expires_in or address):
        raise typer.BadParameter("--name, --scope, --expires-in and --address are for --new.")
    with connection(url, key, data_dir) as client:
        if new:
            make_key(client, route_of(tenant), name, scope, expires_in, address)
            return
        all_keys = answer(client.get(route_of(tenant)))["data"]
    for info in all_keys:
        typer.echo(info["id"])


@tenants.command()
def rotate(
    tenant: Tenant,
    key_id: KeyId,
    overlap: Overlap = "1h",
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Give a key a new secret, which is shown once."""
    with connection(url, key, data_dir) as client:
        rotate_key(client, route_of(tenant), key_id, overlap)


@tenants.command()
def revoke(
    tenant: Tenant,
    key_id: KeyId,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """End a key at once."""
    with connection(url, key, data_dir) as client:
        revoke_key(client, route_of(tenant), key_id)


def _limit(what: str) -> Any:
    return typer.Option(help=f"{what}, or `default`.", metavar="N|default", show_default=False)


@tenants.command()
def limits(
    tenant: Tenant,
    requests_per_minute: Annotated[str | None, _limit("Generation requests a minute")] = None,
    tokens_per_minute: Annotated[str | None, _limit("Tokens a minute, prompts and answers")] = None,
    concurrent_requests: Annotated[str | None, _limit("Generation requests at once")] = None,
    max_context: Annotated[str | None, _limit("Tokens of prompt and answer together")] = None,
    max_n: Annotated[str | None, _limit("Choices of a request")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Show a tenant's limits; change those that are given, at once and without a restart."""
    options = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_requests": concurrent_requests,
        "max_context": max_context,
        "max_n": max_n,
    }
    changes = {name: _limit_value(name, value) for name, value in options.items() if value is not None}
    route = f"/admin/tenants/{tenant}/limits"
    with connection(url, key, data_dir) as client:
        shown = answer(client.get(route))
        if changes:
            shown = answer(client.put(route, json=shown["set"] | changes))
    rows = (
        (name, "default" if value is None else value, _or_none(shown["in_force"][name]))
        for name, value in shown["set"].items()
    )
    print_table(["limit", "set", "in force"], rows)


def _limit_value(name: str, value: str) -> int | None:
    """A limit as the server takes it, which checks its range; None for the default."""
    if value == "default":
        return None
    try:
        return int(value)
    except ValueError:
        option = "--" + name.replace("_", "-")
        raise typer.BadParameter(f"{option} must be a whole number or `default`, not {value!r}.") from None


def _or_none(value: int | None) -> int | str:
    return "none" if value is None else value
