"""Uploads training data to the server, and downloads result files."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from server.cli.http_client import answer, pages
from server.errors import InvalidField, PolypeftError

PATH = "/v1/files"


class DataFile(NamedTuple):
    """A file on the server."""

    id: str
    new: bool  # uploaded now; the server did not have it before


def check_data(path: Path, max_bytes: int) -> None:
    """Raise InvalidField for a file that cannot be uploaded."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InvalidField(f"{str(path)!r} is {'a folder' if path.is_dir() else 'no file'}.")
        path.open("rb").close()
    except OSError as error:
        raise InvalidField(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    if not size:
        raise InvalidField(f"{str(path)!r} is empty.")
    if size > max_bytes:
        raise InvalidField(
            f"{str(path)!r} has {size} bytes, and the server takes {max_bytes} at most: max_file_bytes."
        )


def upload(client: httpx.Client, path: Path, console: Console) -> DataFile:
    """Upload the file, unless the tenant has one with the same bytes on the server."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for known in pages(client, PATH):
        if known["sha256"] == digest and known["purpose"] == "fine-tune":
            return DataFile(known["id"], new=False)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with (
        Progress(*columns, console=console, disable=not console.is_interactive) as bars,
        bars.open(path, "rb", description="uploading") as file,
    ):
        uploaded: dict[str, Any] = answer(
            client.post(PATH, data={"purpose": "fine-tune"}, files={"file": (path.name, file)})
        )
    return DataFile(uploaded["id"], new=True)


def delete_if_new(client: httpx.Client, file: DataFile) -> None:
    """Delete a file that no job uses, if this command has uploaded it. A refusal is ignored."""
    if file.new:
        client.delete(f"{PATH}/{file.id}")


def download(client: httpx.Client, id_: str, folder: Path) -> Path:
    """Write a file of the server into `folder`, under its own name; returns the path.

    Raises PolypeftError if it cannot be written.
    """
    name = Path(answer(client.get(f"{PATH}/{id_}"))["filename"]).name
    with client.stream("GET", f"{PATH}/{id_}/content") as response:
        if not response.is_success:
            answer(response)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except OSError as error:
            raise PolypeftError(f"{str(folder / name)!r} cannot be written: {error.strerror}.") from None
    return folder / name
