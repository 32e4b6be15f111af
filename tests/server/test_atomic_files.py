"""A file is whole or absent, and its temporary file gone, whatever happened while it was written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.atomic_files import replace_file, write_file


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / ".pin.partial").write_text("of a killed writer")
    replace_file(tmp_path / "pin", b"old")
    replace_file(tmp_path / "pin", b"new", durable=False)
    assert contents(tmp_path) == {"pin": "new"}


def test_what_fails_midway_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("broken")

    write_file(tmp_path / "a", [b"o", memoryview(b"ld")])
    with pytest.raises(ValueError, match="broken"):
        write_file(tmp_path / "a", broken())
    assert contents(tmp_path) == {"a": "old"}


def test_the_first_writer_wins_where_absence_is_asked(tmp_path: Path) -> None:
    results = [write_file(tmp_path / "a", [data], only_if_absent=True) for data in (b"1", b"2")]
    assert (results, contents(tmp_path)) == ([True, False], {"a": "1"})


def test_a_secret_is_readable_by_its_owner_alone_from_the_start(tmp_path: Path) -> None:
    def looked() -> Iterator[bytes]:
        [temp] = tmp_path.iterdir()
        assert temp.stat().st_mode & 0o777 == 0o600
        yield b"secret"

    write_file(tmp_path / "key", looked(), mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("durable", [True, False])
def test_only_what_is_durable_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_file(tmp_path / "a", [b"x"], durable=durable)
    replace_file(tmp_path / "b", b"x", durable=durable)
    assert len(synced) == (4 if durable else 0)  # a file and its folder, twice
