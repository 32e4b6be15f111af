"""Where bodies lie while they arrive, and what is on its way out: beside the data, not in a small /tmp."""

import shutil
import tempfile
from pathlib import Path

from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from adapters_store.objects import Objects
from server.settings import Settings

FOLDER = "incoming"  # in the data directory


def incoming(settings: Settings) -> tempfile.TemporaryDirectory[str]:
    """A folder of the caller's own, gone when its block ends."""
    folder = settings.data_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)


def clear_incoming(settings: Settings) -> None:
    """Remove the bodies that died with the process they arrived at. Before the first request only."""
    shutil.rmtree(settings.data_dir / FOLDER, ignore_errors=True)


async def stored_file(settings: Settings, objects: Objects, key: str, name: str, sha256: str) -> FileResponse:
    """The object at `key` as a download called `name`: checked whole before its first byte is sent."""
    folder = incoming(settings)
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
