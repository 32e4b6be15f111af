from dataclasses import dataclass
from pathlib import Path

from server.adapters.tiers import DiskTier, RamTier


@dataclass(frozen=True)
class Item:
    nbytes: int


def name(i: int) -> str:
    return f"{i:064x}"


def write(tier: DiskTier, i: int, size: int) -> None:
    tier.path(name(i)).write_bytes(b"x" * size)
    tier.add(name(i))


def test_ram_drops_the_least_recently_used() -> None:
    tier = RamTier[Item](100)
    for digest in "abc":
        tier.add(digest, Item(30))
    assert tier.get("a") is not None
    tier.add("d", Item(30))
    assert tier.get("b") is None
    assert tier.get("a") is not None
    assert tier.nbytes == 90
    tier.drop("a")
    assert tier.nbytes == 60


def test_ram_keeps_nothing_larger_than_itself() -> None:
    tier = RamTier[Item](100)
    tier.add("a", Item(60))
    tier.add("b", Item(101))
    assert tier.get("a") is not None
    assert tier.get("b") is None


def test_disk_stays_in_its_budget(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    for i in range(5):
        write(tier, i, 40)
    assert tier.nbytes == 80
    assert [tier.has(name(i)) for i in range(5)] == [False, False, False, True, True]
    assert len(list(tmp_path.iterdir())) == 2


def test_disk_survives_a_restart_without_its_drafts(tmp_path: Path) -> None:
    write(DiskTier(tmp_path, 100), 1, 40)
    (tmp_path / f"{name(2)}#123").write_bytes(b"half")
    tier = DiskTier(tmp_path, 100)
    assert tier.has(name(1))
    assert tier.nbytes == 40
    assert not list(tmp_path.glob("*#*"))


def test_disk_notices_a_file_removed_by_hand(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 100)
    write(tier, 1, 40)
    tier.path(name(1)).unlink()
    assert not tier.has(name(1))
    assert tier.nbytes == 0
