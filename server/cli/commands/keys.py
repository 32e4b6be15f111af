"""`polypeft keys`: a tenant's own API keys; with --tenant those of any tenant, for the operator."""

from typing import Annotated

import typer

from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection
from server.cli.keys import (
    Addresses,
    ExpiresIn,
    KeyId,
    Name,
    Overlap,
    Scopes,
    date_of,
    make_key,
    revoke_key,
    rotate_key,
    route_of,
)
from server.cli.output import print_table

keys = typer.Typer(help="A tenant's own API keys; with --tenant another's.", no_args_is_help=True)

Tenant = Annotated[
    str | None, typer.Option("--tenant", help="A tenant's id, or `operator`; needs the operator's key.")
]


@keys.command("list")
def list_(tenant: Tenant = None, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """All keys with their terms, oldest first; never their secrets."""
    with connection(url, key, data_dir) as client:
        found = answer(client.get(route_of(tenant)))["data"]
    rows = (
        (
            *(one["id"], one["name"] or "-", ",".join(one["scopes"])),
            *(date_of(one["expires_at"]), date_of(one["last_used_at"]), ",".join(one["addresses"]) or "-"),
        )
        for one in found
    )
    print_table(["id", "name", "scopes", "expires", "last used", "addresses"], rows)


@keys.command()
def new(
    tenant: Tenant = None,
    name: Name = None,
    scope: Scopes = None,
    expires_in: ExpiresIn = None,
    address: Addresses = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key; it is shown once."""
    with connection(url, key, data_dir) as client:
        make_key(client, route_of(tenant), name, scope, expires_in, address)


@keys.command()
def rotate(
    key_id: KeyId,
    tenant: Tenant = None,
    overlap: Overlap = "1h",
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Give a key a new secret, which is shown once."""
    with connection(url, key, data_dir) as client:
        rotate_key(client, route_of(tenant), key_id, overlap)


@keys.command()
def revoke(
    key_id: KeyId,
    tenant: Tenant = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """End a key at once."""
    with connection(url, key, data_dir) as client:
        revoke_key(client, route_of(tenant), key_id)
