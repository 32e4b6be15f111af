"""`polypeft adapters`: upload, list, delete, restore and alias a tenant's adapters."""

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from server.adapters.formats.ignored_files import CHANGES_PROMPTS, ignored
from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection, pages
from server.cli.output import print_table
from server.errors import InvalidField

adapters = typer.Typer(help="A tenant's adapters.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The adapter's name: what a request gives as `model`.")]

_ADAPTER_FILES = {  # file names of PEFT and AdapterHub
    "adapter_config.json",
    "adapter_interface.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
    "adapter_model.bin",
    "pytorch_adapter.bin",
}


@adapters.command()
def push(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="What PEFT or AdapterHub saved, or its .safetensors file.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Upload an adapter: a new name, or the next version of one."""
    paths = files_of(folder)
    with connection(url, key, data_dir) as client:
        made = send(client, "/v1/adapters", name, paths)
    made["ignored"] += not_sent(folder)
    Console().print_json(data=made)


@adapters.command("list")
def list_(
    deleted: Annotated[bool, typer.Option("--deleted", help="What is deleted and can be restored.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """All of the tenant's adapters."""
    columns = ["name", "version", "method", "rank", "bytes"]
    with connection(url, key, data_dir) as client:
        if not deleted:
            current = pages(client, "/v1/adapters")
            print_table(columns, [[adapter[column] for column in columns] for adapter in current])
            return
        names = pages(client, "/v1/adapters", deleted="true")
        gone = [{"name": name["name"]} | version for name in names for version in name["versions"]]
    rows = [[*(version[column] for column in columns), _when(version["purged_after"])] for version in gone]
    print_table([*columns, "until"], rows)


@adapters.command()
def show(name: Name, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """One adapter with all its versions, as JSON."""
    with connection(url, key, data_dir) as client:
        adapter = answer(client.get(f"/v1/adapters/{name}"))
    Console().print_json(data=adapter)


@adapters.command()
def rm(
    name: Annotated[str, typer.Argument(help="The adapter, or NAME@VERSION for one version of it.")],
    purge: Annotated[bool, typer.Option("--purge", help="For good: it cannot be restored.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Delete an adapter with all its versions. Running requests end as they would have."""
    adapter, _, version = name.partition("@")
    path = f"/v1/adapters/{adapter}" + (f"/versions/{version}" if version else "")
    with connection(url, key, data_dir) as client:
        answer(client.delete(path, params={"purge": str(purge).lower()}))
    typer.echo(f"{name} is {'purged' if purge else 'deleted'}.")


@adapters.command()
def restore(
    name: Name,
    version: Annotated[int | None, typer.Option(help="Only this one of its deleted versions.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Bring back what is deleted of an adapter."""
    params = {} if version is None else {"version": version}
    with connection(url, key, data_dir) as client:
        adapter = answer(client.post(f"/v1/adapters/{name}/restore", params=params))
    typer.echo(f"{name} has {len(adapter['versions'])} versions.")


@adapters.command()
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="What follows the @: NAME@ALIAS.")],
    to: Annotated[str | None, typer.Argument(help="A version, or several with weights: 3=0.9,4=0.1.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Forget it. Of latest: unpin it.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Point an alias at a version, or show where it points."""
    path = f"/v1/adapters/{name}/aliases"
    with connection(url, key, data_dir) as client:
        if delete:
            answer(client.delete(f"{path}/{alias}"))
            typer.echo(f"{name}@{alias} is forgotten.")
            return
        if to is not None:
            answer(client.post(path, json={"alias": alias} | _alias_target(to)))
        _show_alias(answer(client.get(f"{path}/{alias}")))


@adapters.command()
def rollback(
    name: Name,
    alias: Annotated[str, typer.Argument(help="What to roll back.")] = "latest",
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Point an alias where it pointed before it was last moved."""
    with connection(url, key, data_dir) as client:
        _show_alias(answer(client.post(f"/v1/adapters/{name}/aliases/{alias}/rollback")))


@adapters.command()
def history(name: Name, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Who changed what of an adapter, newest first."""
    with connection(url, key, data_dir) as client:
        changes = answer(client.get(f"/v1/adapters/{name}/history"))["data"]
    rows = [
        [_when(change["created"]), change["actor"], change["action"], _moves(change)] for change in changes
    ]
    print_table(["when", "who", "what", "of"], rows)


def send(client: httpx.Client, path: str, name: str, files: list[Path]) -> Any:
    """Upload an adapter's files, with a bar for each."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars, ExitStack() as open_:
        opened = [(f.name, open_.enter_context(bars.open(f, "rb", description=f.name))) for f in files]
        return answer(client.post(path, data={"name": name}, files=[("files", file) for file in opened]))


def not_sent(folder: Path) -> list[dict[str, str]]:
    """The files beside an adapter that changed the prompts of its training, and why they are not sent."""
    beside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [file for file in ignored(beside) if file["reason"] in CHANGES_PROMPTS]


def _alias_target(text: str) -> dict[str, Any]:
    """`3`, `v3` or `3=0.9,4=0.1` as a field of the body. Raises InvalidField."""
    try:
        if "=" not in text:
            return {"version": int(text.removeprefix("v"))}
        pairs = [pair.split("=") for pair in text.split(",")]
        return {"weights": {version.strip(): float(weight) for version, weight in pairs}}
    except ValueError:
        raise InvalidField(f"{text!r} is neither a version nor versions with weights: 3=0.9,4=0.1.") from None


def _show_alias(alias: dict[str, Any]) -> None:
    typer.echo(f"{alias['id']} -> {_target_text(alias['weights'] or alias['version'])}")


def _moves(change: dict[str, Any]) -> str:
    """A change in one line: versions added and removed, aliases moved."""
    signs = [f"+{v}" for v in change["versions_added"]] + [f"-{v}" for v in change["versions_removed"]]
    before, after = change["before"], change["after"]
    moves = [
        f"{alias}: {_target_text(before[alias])} -> {_target_text(after[alias])}" for alias in sorted(after)
    ]
    return "; ".join([*signs, *moves])


def _target_text(points: Any) -> str:
    if isinstance(points, dict):
        return ",".join(f"{version}={weight:g}" for version, weight in points.items())
    return "-" if points is None else str(points)


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds")


def files_of(path: Path) -> list[Path]:
    """The files of an adapter at `path`, without the README, tokenizer or checkpoints beside them.

    Raises InvalidField if there are none.
    """
    if path.is_file():
        config = path.with_name("adapter_config.json")
        return [path, *([config] if config.is_file() else [])]
    files = (
        sorted(p for p in path.iterdir() if p.is_file() and p.name in _ADAPTER_FILES) if path.is_dir() else []
    )
    if any(p.suffix == ".safetensors" for p in files):
        files = [p for p in files if p.suffix != ".bin"]
    if not files:
        raise InvalidField(f"{str(path)!r} holds no adapter_config.json and no adapter_model.safetensors.")
    return files
