import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.adapters.cache.disk_tier import DiskTier
from server.adapters.cache.eviction_policy import FairShares
from server.adapters.cache.ram_tier import RamTier
from server.errors import StoreError
from tests.fixtures.slots import Clock
from tests.waiting import PATIENCE


@dataclass(frozen=True)
class Item:
    nbytes: int


def load(tier: RamTier[Item], digest: str, nbytes: int, room: int = 0, tenant: str = "t") -> None:
    tier.touch(digest, tenant)
    tier.reserve(digest, tenant, room or nbytes)
    tier.insert(digest, Item(nbytes))


def blob(i: int, size: int = 40) -> bytes:
    return bytes([i]) * size


def name(i: int, size: int = 40) -> str:
    return hashlib.sha256(blob(i, size)).hexdigest()


def write(tier: DiskTier, i: int, size: int = 40, tenant: str = "t") -> bool:
    tier.index.shares.record(tenant)
    tier.touch(name(i, size), tenant)
    return tier.write(name(i, size), tenant, memoryview(blob(i, size)))


def read(tier: DiskTier, i: int, size: int = 40) -> bytes | None:
    buffer = bytearray(size)
    return bytes(buffer) if tier.read(name(i, size), memoryview(buffer)) else None


# RAM


def test_ram_drops_what_is_asked_for_least() -> None:
    tier = RamTier[Item](100)
    for digest in "abc":
        load(tier, digest, 30)
    tier.touch("a", "t")
    load(tier, "d", 30)
    assert [tier.get(digest) is not None for digest in "abcd"] == [True, False, True, True]
    assert tier.nbytes == 90
    tier.drop("a")
    assert tier.nbytes == 60


def test_a_load_has_its_room_before_it_begins() -> None:
    tier = RamTier[Item](100)
    load(tier, "a", 30)
    tier.reserve("b", "t", 80)
    assert (tier.nbytes, tier.get("a"), tier.get("b")) == (80, None, None)
    tier.insert("b", Item(20), extra=30)
    assert tier.nbytes == 50
    tier.trim("b", Item(20))  # another one's
    assert tier.nbytes == 50
    found = tier.get("b")
    assert found is not None
    tier.trim("b", found)
    assert tier.nbytes == 20


def test_a_load_that_fails_gives_its_room_back() -> None:
    tier = RamTier[Item](100)
    tier.reserve("a", "t", 80)
    tier.drop("a")  # deleted: its memory is in use all the same
    assert tier.nbytes == 80
    tier.cancel("a")
    assert tier.nbytes == 0


def test_a_load_that_could_never_fit_is_refused() -> None:
    with pytest.raises(StoreError, match="101 bytes"):
        RamTier[Item](100).reserve("a", "t", 101)


def test_a_load_waits_for_room_and_claims_keep_theirs() -> None:
    tier = RamTier[Item](100)
    tier.claim("a")  # before it is there
    load(tier, "a", 60)
    started = threading.Event()

    def second() -> None:
        started.set()
        load(tier, "b", 60)

    thread = threading.Thread(target=second)
    thread.start()
    started.wait(PATIENCE)
    thread.join(0.05)
    assert thread.is_alive()
    assert (tier.get("a") is not None, tier.get("b")) == (True, None)
    tier.release("a")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert (tier.get("a"), tier.get("b")) == (None, Item(60))


def test_whoever_waits_for_room_is_told_when_the_engine_stops() -> None:
    tier = RamTier[Item](100)
    tier.claim("a")
    load(tier, "a", 100)
    told: list[StoreError] = []

    def second() -> None:
        try:
            tier.reserve("b", "t", 1)
        except StoreError as error:
            told.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    tier.close()
    thread.join(PATIENCE)
    assert len(told) == 1


def test_a_flood_does_not_empty_anothers_ram() -> None:
    shares = FairShares(Clock())
    tier = RamTier[Item](100, shares)
    for i in range(4):
        shares.record("B")
        load(tier, f"b{i}", 10, tenant="B")
    for i in range(200):
        shares.record("A")
        load(tier, f"a{i}", 10, tenant="A")
    assert all(tier.get(f"b{i}") for i in range(4))
    assert tier.nbytes == 100


# disk


def test_disk_stays_in_its_budget(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    for i in range(5):
        write(tier, i)
        write(tier, i)
        assert tier.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    assert write(tier, 1)
    assert read(tier, 1) == blob(1)
    assert read(tier, 2) is None
    assert not write(tier, 3, size=101)


def test_disk_survives_a_restart_without_its_drafts(tmp_path: Path) -> None:
    write(DiskTier(tmp_path, 100), 1)
    (tmp_path / f"{name(2)}#123").write_bytes(b"half")
    tier = DiskTier(tmp_path, 100)
    assert read(tier, 1) == blob(1)
    assert tier.nbytes == 40
    assert not list(tmp_path.glob("*#*"))


def test_a_smaller_budget_keeps_the_most_recently_used(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 200)
    for i in range(4):
        write(tier, i)
        os.utime(tier.path(name(i)), (i, i))
    assert read(tier, 0) is not None
    tier = DiskTier(tmp_path, 100)
    assert [read(tier, i) is not None for i in range(4)] == [True, False, False, True]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "empty": lambda _data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_counted_and_dropped(tmp_path: Path, damage: str) -> None:
    write(DiskTier(tmp_path, 100), 1)
    path = tmp_path / name(1)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    tier = DiskTier(tmp_path, 100)
    assert read(tier, 1) is None
    assert (tier.corrupt, tier.nbytes, path.exists()) == (1, 0, False)
    assert write(tier, 1)
    assert read(tier, 1) == blob(1)


def test_disk_notices_a_file_removed_by_hand(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    write(tier, 1)
    tier.path(name(1)).unlink()
    assert read(tier, 1) is None
    assert (tier.nbytes, tier.corrupt) == (0, 0)


def test_foreign_things_in_the_folder_are_neither_read_nor_counted_nor_removed(tmp_path: Path) -> None:
    folder, secret = tmp_path / "cache", tmp_path / "secret"
    folder.mkdir()
    secret.write_bytes(blob(1))
    (folder / "notes.txt").write_bytes(b"an operator's")
    (folder / "lost+found").mkdir()
    (folder / name(2)).mkdir()
    (folder / name(1)).symlink_to(secret)
    tier = DiskTier(folder, 100)
    assert tier.nbytes == 0
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "lost+found", name(2)}
    assert not write(tier, 2)  # a folder stands in its place
    assert tier.failures == 1
    assert secret.read_bytes() == blob(1)


def test_a_link_put_there_later_is_not_followed(tmp_path: Path) -> None:
    folder, secret = tmp_path / "cache", tmp_path / "secret"
    tier = DiskTier(folder, 100)
    write(tier, 1)
    secret.write_bytes(blob(1))
    (folder / name(1)).unlink()
    (folder / name(1)).symlink_to(secret)
    assert read(tier, 1) is None
    assert not (folder / name(1)).is_symlink()
    assert secret.exists()


def test_a_full_disk_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(tmp_path, 100)

    def full(_path: Path, *_args: Any, **_more: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert not write(tier, 1)
    assert (tier.nbytes, tier.failures) == (0, 1)
    assert list(tmp_path.iterdir()) == []
    assert write(tier, 1)


def test_copies_make_way_while_others_fill_the_disk_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, free = DiskTier(tmp_path, 1000), 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: shutil._ntuple_diskusage(20_000, 0, free))
    assert all(write(tier, i) for i in range(4))
    tier.free_disk_space()
    assert len(tier) == 4
    free = 200 - 50  # 200 are to be left free
    tier.free_disk_space()
    assert [read(tier, i) is not None for i in range(4)] == [False, False, True, True]
    assert not write(tier, 5)
    free = 10_000
    assert write(tier, 5)


def test_a_disk_that_has_no_room_for_the_folder_is_done_without_until_it_has(tmp_path: Path) -> None:
    in_the_way = tmp_path / "cache"
    in_the_way.write_text("")
    tier = DiskTier(in_the_way / "adapters", 1000)
    assert not write(tier, 1)
    assert read(tier, 1) is None
    in_the_way.unlink()
    assert write(tier, 1)
    assert read(tier, 1) == blob(1)


def test_a_scan_does_not_wear_the_disk_out(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 400)
    for _ in range(3):
        for i in range(10):
            write(tier, i)
    written = sum(write(tier, i) for i in range(100, 130))
    assert written == 0
    assert all(read(tier, i) for i in range(10))


KILLED = """
import os, signal, sys
from pathlib import Path
from server.adapters.cache.disk_tier import DiskTier
data, place = bytes([7]) * 100_000, int(sys.argv[2])
tier = DiskTier(Path(sys.argv[1]), 1 << 20)
opened, replaced = Path.open, Path.replace
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
class Half:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def write(self, data):
        self.file.write(data[: place]); self.file.flush(); die()
if place < len(data):
    Path.open = lambda self, *a, **k: Half(opened(self, *a, **k))
else:
    Path.replace = die
tier.write(sys.argv[3], "t", memoryview(data))
"""


@pytest.mark.parametrize("place", [0, 1, 50_000, 100_000])
def test_a_write_that_was_killed_leaves_nothing_to_read(tmp_path: Path, place: int) -> None:
    sha256 = hashlib.sha256(bytes([7]) * 100_000).hexdigest()
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(place), sha256]
    assert subprocess.run(command, cwd=Path.cwd(), check=False).returncode == -signal.SIGKILL
    assert [path.name.partition("#")[0] for path in tmp_path.iterdir()] == [sha256]
    tier = DiskTier(tmp_path, 1 << 20)
    assert (list(tmp_path.iterdir()), tier.nbytes) == ([], 0)
    assert not tier.read(sha256, memoryview(bytearray(100_000)))
