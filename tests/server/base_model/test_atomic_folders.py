"""A folder that exists is whole, whatever happened while it was built."""

import threading
import time
from pathlib import Path

import pytest

from server.base_model.atomic_folders import build_once
from tests.waiting import PATIENCE


def test_a_cut_build_leaves_nothing_and_the_next_one_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"

    def cut(staging: Path) -> None:
        (staging / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(target, cut)
    assert not target.exists()

    def resume(staging: Path) -> None:
        (staging / "half").rename(staging / "whole")

    build_once(target, resume)
    assert [p.name for p in target.iterdir()] == ["whole"]


def test_a_complete_folder_is_not_built_again(tmp_path: Path) -> None:
    target = build_once(tmp_path / "m", lambda staging: (staging / "f").touch())
    assert build_once(target, lambda _: pytest.fail("built again")) == target


def test_two_starters_build_once(tmp_path: Path) -> None:
    builds: list[Path] = []

    def slow(staging: Path) -> None:
        builds.append(staging)
        time.sleep(0.2)
        (staging / "f").touch()

    starters = [threading.Thread(target=build_once, args=(tmp_path / "m", slow)) for _ in range(2)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(PATIENCE)
    assert len(builds) == 1
    assert (tmp_path / "m" / "f").exists()
