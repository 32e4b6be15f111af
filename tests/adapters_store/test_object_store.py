import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters_store.object_store.store import Objects
from server.errors import NotFound, StartupError, StoreError
from tests.fixtures.s3 import Weed


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "s3":
        weed: Weed = request.getfixturevalue("weed")
        return weed.open()
    return Objects.open((tmp_path / "s t").as_uri() if request.param == "file" else "memory://")


@pytest.mark.anyio
async def test_put_get_head_list_delete(store: Objects) -> None:
    await store.put("t/a/2", b"two")
    await store.put("t/a/1", b"one")
    await store.put("t/ab/1", b"other")
    assert await store.get("t/a/1") == b"one"
    assert (await store.head("t/a/2")).bytes == 3
    assert await store.list("t/a/") == ["t/a/1", "t/a/2"]
    await store.put("t/a/1", b"1")
    assert store.get_sync("t/a/1") == b"1"
    await store.delete("t/a/1")
    await store.delete("t/a/1")
    assert await store.list("t") == ["t/a/2", "t/ab/1"]
    for missing in (store.get, store.head):
        with pytest.raises(NotFound):
            await missing("t/a/1")


@pytest.mark.parametrize("size", [0, 10, 19 << 20])
def test_files_travel_whole_and_checked(store: Objects, tmp_path: Path, size: int) -> None:
    data = bytes(range(250)) * (size // 250) + b"x" * (size % 250)
    (tmp_path / "in").write_bytes(data)
    store.put_sync("k", tmp_path / "in", sha256(data))
    store.download_sync("k", tmp_path / "new" / "out", sha256(data))
    assert (tmp_path / "new" / "out").read_bytes() == data


def test_wrong_bytes_are_neither_stored_nor_fetched(store: Objects, tmp_path: Path) -> None:
    for size in (5, 9 << 20):
        (tmp_path / "in").write_bytes(b"x" * size)
        with pytest.raises(StoreError, match="SHA-256"):
            store.put_sync("bad", tmp_path / "in", sha256(b"y"))
    store.put_sync("k", b"flipped")
    with pytest.raises(StoreError, match="SHA-256"):
        store.download_sync("k", tmp_path / "got" / "out", sha256(b"intended"))
    assert list((tmp_path / "got").iterdir()) == []
    assert store.list_sync("bad") == []


def test_of_many_creates_one_wins_and_its_bytes_stay(store: Objects) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: store.create_sync("k", b"%d" % i), range(50)))
    assert sum(won) == 1
    assert store.get_sync("k") == b"%d" % won.index(True)


@pytest.mark.parametrize(
    "key", ["../x", "a/../b", "/a", "a//b", "", ".", "a/", "a\\b", "a\x00", "a#1", "é", "a%2fb"]
)
def test_no_key_leaves_the_prefix(store: Objects, key: str) -> None:
    for call in (store.get_sync, store.delete_sync, store.head_sync):
        with pytest.raises(ValueError, match="key"):
            call(key)
    with pytest.raises(ValueError, match="key"):
        store.create_sync(key, b"")


@pytest.mark.parametrize("url", ["", "/tmp/x", "ftp://h/x", "http://h/x", "file://relative/x", "s3:///x"])
def test_what_is_no_store_stops_the_start(url: str) -> None:
    with pytest.raises(StartupError, match="store"):
        Objects.open(url)


def test_a_folder_in_the_way_is_a_store_error(tmp_path: Path) -> None:
    store = Objects.open(tmp_path.as_uri())
    store.put_sync("a/b", b"")
    with pytest.raises(StoreError):
        store.put_sync("a/b/c", b"")


def test_a_silent_server_is_a_store_error_soon() -> None:
    store = Objects.open(
        "s3://bucket/prefix",
        options={
            "endpoint": "http://127.0.0.1:9",
            "access_key_id": "a",
            "secret_access_key": "b",
            "region": "us-east-1",
        },
    )
    with pytest.raises(StoreError):
        store.get_sync("k")


KILLED = """
import os, signal, sys
from adapters_store.object_store.store import Objects

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

setattr(os, sys.argv[2], die)
Objects.open(sys.argv[1]).create_sync("a/manifest", b"whole")
"""


@pytest.mark.parametrize("at", ["fsync", "link"])
def test_a_process_killed_midway_leaves_nothing_visible(tmp_path: Path, at: str) -> None:
    store = Objects.open(tmp_path.as_uri())
    store.put_sync("a/other", b"")  # the folder exists: the first fsync is the draft's own
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path.as_uri(), at], check=False)
    assert done.returncode == -9
    assert store.list_sync("a") == ["a/other"]
    assert store.create_sync("a/manifest", b"whole")


def test_what_is_acknowledged_was_synced_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that survives power loss: file, then its name, then the folder that holds the name."""
    done: list[str] = []
    real_fsync, real_link = os.fsync, os.link
    (tmp_path / "a").mkdir()

    def fsync(descriptor: int) -> None:
        done.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_fsync(descriptor)

    def link(source: Path, target: Path) -> None:
        done.append("link")
        real_link(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    Objects.open(tmp_path.as_uri()).create_sync("a/k", b"x")
    assert done == ["file", "link", "folder"]
