"""Temporary folders for uploads and downloads, in the data directory: /tmp may be small."""

import shutil
import tempfile
from pathlib import Path

from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from adapters_store.object_store.store import Objects
from server.settings import Settings

FOLDER = "incoming"  # in the data directory


def temp_folder(settings: Settings) -> tempfile.TemporaryDirectory[str]:
    """A new folder, removed when its block ends."""
    folder = settings.data_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    prefix = _prefix(settings.api_number)
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True)


def clear_temp_folders(settings: Settings) -> None:
    """Remove what an earlier process of this number left. Call it before the first request only.

    The folders of other API processes stay: they may be in use.
    """
    others = tuple(_prefix(n) for n in range(settings.api_processes) if n != settings.api_number)
    for path in (settings.data_dir / FOLDER).glob("*"):
        if not path.name.startswith(others):
            shutil.rmtree(path, ignore_errors=True)


def _prefix(api_number: int) -> str:
    return f"{api_number}-"


async def stored_file(settings: Settings, objects: Objects, key: str, name: str, sha256: str) -> FileResponse:
    """The object at `key` as a download called `name`. Its SHA-256 is verified before the first byte is sent.

    Raises NotFound, CorruptObject, StoreError.
    """
    folder = temp_folder(settings)
    try:
        path = Path(folder.name) / "blob"
        await objects.download(key, path, sha256)
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=name,
        headers={"etag": f'"{sha256}"'},
        background=BackgroundTask(folder.cleanup),
    )
