"""Bodies that died with their process are removed by the one that follows it, and no living one's are."""

from pathlib import Path

from server.api.http.temp_files import clear_temp_folders, temp_folder
from server.settings import Settings


def test_a_process_clears_its_own_and_what_is_nobodys(tmp_path: Path) -> None:
    first, second, gone = (Settings(data_dir=tmp_path, api_processes=2, api_number=n) for n in (0, 1, 11))
    with temp_folder(first) as living, temp_folder(second) as dead, temp_folder(gone) as of_a_larger_serve:
        Path(dead, "file").touch()
        clear_temp_folders(second)
        assert [Path(folder).exists() for folder in (living, dead, of_a_larger_serve)] == [True, False, False]


def test_there_may_be_nothing_to_clear(tmp_path: Path) -> None:
    clear_temp_folders(Settings(data_dir=tmp_path))
    assert not (tmp_path / "incoming").exists()
