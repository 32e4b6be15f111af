"""`polypeft admin`: repairs. Needs the operator's key."""

import typer
from rich.console import Console

from server.cli.connection import DEFAULT_URL, DataDir, Key, Url, answer, connection

admin = typer.Typer(help="Repairs (operator).", no_args_is_help=True)


@admin.callback()
def _group() -> None:
    """Without this, typer would take the only command for the whole group."""


@admin.command()
def rebuild_index(url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Read every manifest in the object store, and make the index of adapters say what they say."""
    with (
        connection(url, key, data_dir) as client,
        Console(stderr=True).status("Reading the manifests"),
    ):
        done = answer(client.post("/admin/rebuild-index"))
    typer.echo(f"The index holds {done['versions']} versions.")
