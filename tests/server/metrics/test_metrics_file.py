"""A process's figures in a file: as prometheus_client reads them, and given up while the disk is full."""

import errno
import os
from pathlib import Path

import pytest
from prometheus_client.mmap_dict import MmapedDict

from server.metrics import metrics_file as figures_file
from server.metrics.metrics_file import MetricsFile


def read(path: Path) -> dict[str, float]:
    found = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
    return {key: value for key, value, *_ in found}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures_file, "RETRY_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "counter_1.db"


def full(_descriptor: int, _data: bytes, _offset: int) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_library_reads_what_was_written_and_a_restart_goes_on(path: Path) -> None:
    keys = [f'["a", "a", {{"label": "{"é" * length}"}}, "help"]' for length in range(9)]
    file = MetricsFile(str(path))
    for number, key in enumerate(keys):
        file.write_value(key, float(number), 0.0)
    file.write_value(keys[0], 7.0, 0.0)
    assert file.read_value("new") == (0.0, 0.0)
    file.close()
    expected = {key: float(number) for number, key in enumerate(keys)} | {keys[0]: 7.0, "new": 0.0}
    assert read(path) == expected
    again = MetricsFile(str(path))
    assert again.read_value(keys[0]) == (7.0, 0.0)
    again.write_value("newer", 1.0, 0.0)
    assert read(path) == expected | {"newer": 1.0}
    again.close()


def test_more_than_the_first_size_fits(path: Path) -> None:
    file = MetricsFile(str(path))
    keys = [f"{number:0100}" for number in range(2000)]
    for key in keys:
        file.write_value(key, 1.0, 0.0)
    assert read(path) == dict.fromkeys(keys, 1.0)
    file.close()


def test_a_full_disk_loses_nothing_that_is_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(str(path))
    file.write_value("a", 1.0, 0.0)
    monkeypatch.setattr(os, "pwrite", full)
    file.write_value("a", 2.0, 0.0)
    file.write_value("b", 3.0, 0.0)
    assert file.read_value("a") == (2.0, 0.0)
    assert read(path) == {"a": 1.0}, "what stood there, and nothing by half"
    monkeypatch.undo()
    monkeypatch.setattr(figures_file, "RETRY_SECONDS", 0.0)
    file.write_value("c", 4.0, 0.0)
    assert read(path) == {"a": 2.0, "b": 3.0, "c": 4.0}
    file.close()


def test_a_disk_that_is_full_or_read_only_from_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "ftruncate", lambda *_: full(0, b"", 0))
    file = MetricsFile(str(path))
    file.write_value("a", 2.0, 0.0)
    assert not path.exists(), "no file that a reader would stumble over"
    monkeypatch.undo()
    monkeypatch.setattr(figures_file, "RETRY_SECONDS", 0.0)
    file.write_value("b", 1.0, 0.0)
    assert read(path) == {"a": 2.0, "b": 1.0}
    file.close()
