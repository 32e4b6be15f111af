"""`polypeft tenants`: tenants, their API keys and limits. Needs the operator's key."""

from typing import Annotated

import typer

from server.cli.commands.limits import limits
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


tenants.command()(limits)
