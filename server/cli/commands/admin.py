"""`polypeft admin`: repairs, garbage collection, imports. Needs the operator's key."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from server.cli.commands.adapters import send
from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection
from server.cli.hub import fetch_adapter
from server.cli.output import print_table
from server.cli.sse import read_events
from server.errors import PolypeftError

admin = typer.Typer(help="Repairs and imports (operator).", no_args_is_help=True)


@admin.command()
def rebuild_index(url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Read every manifest in the object store, and make the index of adapters say what they say."""
    with (
        connection(url, key, data_dir) as client,
        Console(stderr=True).status("Reading the manifests"),
    ):
        done = answer(client.post("/admin/rebuild-index"))
    typer.echo(f"The index holds {done['versions']} versions.")


@admin.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Remove blobs that no version needs: of uploads that came to nothing."""
    with (
        connection(url, key, data_dir) as client,
        Console(stderr=True).status("Comparing blobs with manifests"),
    ):
        garbage = answer(client.post("/admin/gc", json={"dry_run": dry_run}))
    for name in garbage["keys"]:
        typer.echo(name)
    verb = "would be removed" if dry_run else "are removed"
    typer.echo(f"{garbage['blobs']} blobs ({garbage['bytes']} bytes) and {garbage['drafts']} drafts {verb}.")
    if garbage["skipped_tenants"]:
        skipped = ", ".join(garbage["skipped_tenants"])
        raise PolypeftError(f"Nothing was collected of {skipped}: a manifest cannot be read.")


@admin.command()
def verify(url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Read every manifest and blob. Status 1 if one that a version needs is missing or corrupt."""
    findings: list[dict[str, Any]] = []
    with connection(url, key, data_dir) as client, Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("Reading the store", total=None)
        with client.stream("POST", "/admin/verify") as response:
            for event in read_events(response):
                bars.update(task, completed=event.data["done"], total=event.data["total"])
                findings += event.data["findings"]
    print_table(["kind", "version", "key"], [[f["kind"], f["version"] or "-", f["key"]] for f in findings])
    faults = sum(finding["fault"] for finding in findings)
    if faults:
        raise PolypeftError(f"{faults} objects that versions need are missing or corrupt.")
    typer.echo(
        f"Nothing is wrong; {len(findings)} objects are left from uploads that came to nothing.", err=True
    )


@admin.command("import")
def import_(
    model: Annotated[str, typer.Argument(help="owner/name[@revision] on the hub.")],
    tenant: Annotated[str, typer.Option(help="The tenant's id: whose it shall be.")],
    name: Annotated[str, typer.Option(help="What to call the adapter.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Fetch an adapter from the hub to this machine, and upload it for a tenant. Safetensors only."""
    with connection(url, key, data_dir) as client, TemporaryDirectory() as folder:
        with Console(stderr=True).status(f"Fetching {model}"):
            files = fetch_adapter(model, Path(folder))
        made = send(client, f"/admin/tenants/{tenant}/adapters", name, files)
    Console().print_json(data=made)
