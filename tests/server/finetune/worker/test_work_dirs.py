"""Workers' folders: each its own, and what a killed one left does not stay."""

import subprocess
import sys
from pathlib import Path

from server.finetune.worker.work_dirs import LOCK_FILE, attempt_dir, bytes_in, worker_dir

HOLDER = """
import pathlib, sys, time
from server.finetune.worker.work_dirs import worker_dir
with worker_dir(pathlib.Path(sys.argv[1]), "other") as folder:
    (folder / "job").mkdir()
    print("ready", flush=True)
    time.sleep(600)
"""


def test_it_is_there_for_the_block(tmp_path: Path) -> None:
    with worker_dir(tmp_path / "root", "w") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        with attempt_dir(folder, "ftjob-1") as place:
            (place / "deep").mkdir()
            (place / "deep" / "file").write_bytes(b"12345")
            assert bytes_in(place) == 5
        assert not place.exists()
    assert list((tmp_path / "root").iterdir()) == []


def test_a_desk_is_empty_whoever_sat_there(tmp_path: Path) -> None:
    (tmp_path / "ftjob-1").mkdir()
    (tmp_path / "ftjob-1" / "left").touch()
    with attempt_dir(tmp_path, "ftjob-1") as place:
        assert list(place.iterdir()) == []


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path.cwd()
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        (tmp_path / "young").mkdir()  # made this moment, not locked yet
        with worker_dir(tmp_path, "mine"):
            assert (tmp_path / "other" / "job").exists()
        holder.kill()
    assert (tmp_path / "other" / LOCK_FILE).exists()
    with worker_dir(tmp_path, "mine"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "young"]


def test_a_link_out_of_the_folder_counts_as_a_link(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(10_000))
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "link").symlink_to(tmp_path / "big")
    assert bytes_in(tmp_path / "place") < 1000
