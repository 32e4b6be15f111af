"""Journals: what was written outlives a process that is killed, and one process at a time has it."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.usage.journal import Journal, Leftover, leftovers, write_journal
from server.usage.record import CUT, OPEN
from tests.server.usage.records import record

CHILD = """
import os, signal, sys
from pathlib import Path
from server.usage.journal import Journal
from tests.server.usage.records import record
journal = Journal(Path(sys.argv[1]))
journal.append([record(0, id="runs", outcome="", generated_tokens=1)])
journal.append([record(1), record(1, id="runs", outcome="", generated_tokens=7)])
print("written", flush=True)
signal.pause()
"""


def taken(folder: Path) -> list[Leftover]:
    return list(leftovers(folder))


def test_a_killed_process_leaves_its_records_to_one_other(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"written\n"
    assert not taken(tmp_path), "its process lives"
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    child.stdout.close()
    [leftover] = taken(tmp_path)
    assert not taken(tmp_path), "it is held"
    assert leftover.records == [record(1), record(2, id="runs", outcome=CUT, generated_tokens=7)]
    with leftover:
        leftover.remove()
    assert not [*tmp_path.iterdir()]


def test_what_runs_is_cut_with_the_same_numbers_whoever_reads_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for name in "ab":
        journal.append([record(0, id=name, outcome=OPEN)])
    journal.append([record(n) for n in (1, 2, 3)])
    journal.append([record(4, id="a")])
    journal.replace([record(4, id="b", outcome=OPEN), record(4, id="c", outcome=OPEN)])
    journal.close(remove=False)
    for _ in range(2):
        [leftover] = taken(tmp_path)
        with leftover:
            assert [(one.id, one.number, one.outcome) for one in leftover.records] == [
                ("b", 5, CUT),
                ("c", 6, CUT),
            ]


def test_a_line_that_was_cut_short_is_no_record(tmp_path: Path) -> None:
    write_journal(tmp_path, [record(1), record(2)])
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    [leftover] = taken(tmp_path)
    with leftover:
        assert leftover.records == [record(1)]


def test_a_damaged_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_journal(tmp_path, [record(1), record(2)])
    [path] = tmp_path.iterdir()
    path.write_bytes(b"\0\xff{}\n" + path.read_bytes())
    [leftover] = taken(tmp_path)
    with leftover:
        assert leftover.records == [record(1), record(2)]
    assert "1 lines of a journal of usage are damaged" in caplog.text


def test_a_write_that_fails_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path), os.write
    journal.append([record(1)])

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 10:
            return write(descriptor, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", lambda fd, data: full(fd, data[:15]))
    with pytest.raises(OSError, match="No space"):
        journal.append([record(2)])
    with pytest.raises(OSError, match="No space"):
        journal.replace([record(1), record(2)])
    monkeypatch.undo()
    journal.append([record(3)])
    journal.close(remove=False)
    [leftover] = taken(tmp_path)
    with leftover:
        assert leftover.records == [record(1), record(3)]


def test_a_journal_whose_records_are_all_counted_leaves_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([record(1)])
    journal.close(remove=True)
    assert not [*tmp_path.iterdir()]
