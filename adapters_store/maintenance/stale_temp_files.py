"""Temporary files that killed processes left in a file:// store; server/atomic_files.py names them.

Nothing reads them. In a cloud's store, unfinished multipart uploads are removed by the bucket's own rule.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def remove_stale_temp_files(store_url: str, grace_seconds: float, *, dry_run: bool = False) -> list[str]:
    """Remove, or only list, temporary files older than the grace period. Returns sorted paths in the store.

    Blocking. A store that is no folder has none.
    """
    parts = urlsplit(store_url)
    if parts.scheme != "file":
        return []
    root, newest = Path(url2pathname(parts.path)), time.time() - grace_seconds
    found = []
    for temp in _temp_files(root):
        try:
            if temp.stat().st_mtime > newest:
                continue
            if not dry_run:
                temp.unlink()
        except FileNotFoundError:  # finished meanwhile
            continue
        found.append(temp.relative_to(root).as_posix())
    return sorted(found)


def _temp_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*#*"):
        _, separator, number = path.name.rpartition("#")
        if separator and number.isascii() and number.isdigit() and path.is_file():
            yield path
