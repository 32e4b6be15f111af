"""What a killed process left of a file:// store's unfinished writes: see atomic_files.py for their names.

Nothing reads a draft, so none is missed; in a cloud's store the parts of a cut upload are the bucket's to
expire (its rule for incomplete multipart uploads).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def remove_stale_temp_files(store_url: str, grace_seconds: float, *, dry_run: bool = False) -> list[str]:
    """Remove, or only name, the drafts older than the grace period: their paths in the store. Blocking."""
    parts = urlsplit(store_url)
    if parts.scheme != "file":
        return []
    root, before = Path(url2pathname(parts.path)), time.time() - grace_seconds
    found = []
    for draft in _drafts(root):
        try:
            if draft.stat().st_mtime > before:
                continue
            if not dry_run:
                draft.unlink()
        except FileNotFoundError:  # finished meanwhile
            continue
        found.append(draft.relative_to(root).as_posix())
    return sorted(found)


def _drafts(root: Path) -> Iterator[Path]:
    for path in root.rglob("*#*"):
        _, mark, number = path.name.rpartition("#")
        if mark and number.isascii() and number.isdigit() and path.is_file():
            yield path
