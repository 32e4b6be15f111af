"""`polypeft adapters`: a tenant's adapters, as files come and go."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from server.cli.connection import DEFAULT_URL, DataDir, Key, Url, answer, connection, pages
from server.cli.output import print_table
from server.errors import InvalidField

adapters = typer.Typer(help="A tenant's adapters.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The adapter's name: what a request gives as `model`.")]

_FILES = {  # what PEFT and AdapterHub call theirs; one of the weights is enough
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
    paths = _files_of(folder)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with (
        connection(url, key, data_dir) as client,
        Progress(*columns, console=console) as bars,
        ExitStack() as open_,
    ):
        files = [
            ("files", (path.name, open_.enter_context(bars.open(path, "rb", description=path.name))))
            for path in paths
        ]
        made = answer(client.post("/v1/adapters", data={"name": name}, files=files))
    Console().print_json(data=made)


@adapters.command("list")
def list_(url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """All of the tenant's adapters."""
    columns = ["name", "version", "method", "rank", "bytes"]
    with connection(url, key, data_dir) as client:
        print_table(
            columns, [[adapter[column] for column in columns] for adapter in pages(client, "/v1/adapters")]
        )


@adapters.command()
def show(name: Name, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """One adapter with all its versions, as JSON."""
    with connection(url, key, data_dir) as client:
        found = answer(client.get(f"/v1/adapters/{name}"))
    Console().print_json(data=found)


@adapters.command()
def rm(name: Name, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Delete an adapter with all its versions. Running requests end as they would have."""
    with connection(url, key, data_dir) as client:
        answer(client.delete(f"/v1/adapters/{name}"))
    typer.echo(f"{name} is deleted.")


def _files_of(path: Path) -> list[Path]:
    """An adapter's own files: not the README, tokenizer or checkpoints that training leaves beside them."""
    if path.is_file():
        config = path.with_name("adapter_config.json")
        return [path, *([config] if config.is_file() else [])]
    found = sorted(p for p in path.iterdir() if p.is_file() and p.name in _FILES) if path.is_dir() else []
    if any(p.suffix == ".safetensors" for p in found):
        found = [p for p in found if p.suffix != ".bin"]
    if not found:
        raise InvalidField(f"{str(path)!r} holds no adapter_config.json and no adapter_model.safetensors.")
    return found
