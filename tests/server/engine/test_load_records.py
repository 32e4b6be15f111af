"""The records that the engine leaves of its loads: all of them, each once, also if the disk was full."""

import errno
from pathlib import Path

import pytest

from server.adapters.loading.loader import Load
from server.engine.load_records import LoadRecords
from server.messages import AdapterRef
from server.usage.journal import leftovers
from server.usage.record import COMPLETED, Record

REF = AdapterRef("ten_1", "poet", 3, "d" * 64, "lora", "key")


def taken(folder: Path) -> list[Record]:
    found: list[Record] = []
    for leftover in leftovers(folder):
        with leftover:
            found += leftover.records
            leftover.remove()
    return found


def test_a_load_is_its_tenants_and_its_versions(tmp_path: Path) -> None:
    records = LoadRecords(tmp_path)
    records.write([])
    assert not [*tmp_path.iterdir()]
    records.write([Load(REF, 0.5, 100), Load(REF, 0.1, error="model_not_found")])
    good, bad = taken(tmp_path)
    assert (good.tenant, good.adapter, good.key, good.outcome) == ("ten_1", "poet@3", "", COMPLETED)
    assert (good.amounts.loads, good.amounts.load_bytes, good.amounts.load_ms) == (1, 100, 500)
    assert (bad.outcome, bad.amounts.loads, bad.amounts.failed_loads) == ("model_not_found", 0, 1)
    assert good.id != bad.id


def test_what_a_full_disk_did_not_take_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    records = LoadRecords(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("server.engine.load_records.write_journal", full)
        records.write([Load(REF, 0.5, 1)])
    records.write([Load(REF, 0.5, 2)])
    records.write([])
    assert [record.bytes for record in taken(tmp_path)] == [1, 2]
