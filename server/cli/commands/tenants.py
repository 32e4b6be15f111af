"""`polypeft tenants`: tenants, their API keys and limits. Needs the operator's key."""

from typing import Annotated

import typer

from server.cli.commands.limits import limits
from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection
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
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """A tenant's keys, without their secrets."""
    with connection(url, key, data_dir) as client:
        if new:
            created = answer(client.post(f"/admin/tenants/{tenant}/keys"))
            typer.echo(f"id      {created['id']}\nsecret  {created['secret']}")
            return
        all_keys = answer(client.get(f"/admin/tenants/{tenant}/keys"))["data"]
    for info in all_keys:
        typer.echo(info["id"])


@tenants.command()
def revoke(
    tenant: Tenant,
    key_id: Annotated[str, typer.Argument(help="The key's id, as `tenants keys` shows it.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """End a key at once."""
    with connection(url, key, data_dir) as client:
        answer(client.delete(f"/admin/tenants/{tenant}/keys/{key_id}"))
    typer.echo(f"{key_id} is revoked.")


tenants.command()(limits)
