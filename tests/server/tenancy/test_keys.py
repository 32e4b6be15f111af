import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import StartupError
from server.settings import Settings
from server.tenancy.keys import new_secret, operator_key, same_secret, well_formed


def test_the_operators_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    secret = operator_key(settings)
    assert well_formed(secret)
    assert operator_key(settings) == secret
    assert settings.operator_key_path == settings.data_dir / "admin.key"
    assert stat.S_IMODE(settings.operator_key_path.stat().st_mode) == 0o600
    assert [path.name for path in settings.data_dir.iterdir()] == ["admin.key"]


def test_of_many_starts_at_once_one_makes_the_key(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: operator_key(settings), range(64)))
    assert len(set(made)) == 1


def test_servers_share_a_key_by_its_file(tmp_path: Path) -> None:
    """As a secret is mounted: a link to a file that all may read. Nothing is made in the data directory."""
    secret = "a-key-that-was-made-elsewhere_1234567890"
    (tmp_path / "mounted").write_text(secret + "\n")
    (tmp_path / "mounted").chmod(0o444)
    (tmp_path / "key").symlink_to("mounted")
    for name in ("one", "two"):
        settings = Settings(data_dir=tmp_path / name, admin_key_file=tmp_path / "key")
        assert operator_key(settings) == secret
        assert not settings.data_dir.exists()


CONTENTS = [
    b"",
    b"\n",
    b"hello\n",
    b"\xff\xfe" * 30,
    b"k" * 31,
    b"two words " * 8,
    b"k" * 40 + b"\n" + b"k" * 40,
]


@pytest.mark.parametrize("content", [*CONTENTS, b"k" * 1025])
def test_a_file_that_holds_no_key_stops_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "admin.key").write_bytes(content)
    with pytest.raises(StartupError, match=r"^admin\.key in the data directory holds no key"):
        operator_key(Settings(data_dir=tmp_path))
    given = Settings(data_dir=tmp_path / "data", admin_key_file=tmp_path / "admin.key")
    with pytest.raises(StartupError, match=r"^--admin-key-file '.*/admin\.key' holds no key") as refused:
        operator_key(given)
    assert "hello" not in refused.value.message, "what it holds may be a key with a mistake"


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_key_that_others_can_change_stops_the_start(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_text(new_secret())
    path.chmod(mode)
    with pytest.raises(StartupError, match=f"its mode is {mode:04o}"):
        operator_key(Settings(admin_key_file=path))
    path.chmod(mode & 0o755)
    assert operator_key(Settings(admin_key_file=path)) == path.read_text()


def test_a_key_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be read: No such file"):
        operator_key(Settings(admin_key_file=tmp_path / "none"))
    with pytest.raises(StartupError, match="is not a file"):
        operator_key(Settings(admin_key_file=tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StartupError, match="is not a file"):
        operator_key(Settings(admin_key_file=tmp_path / "pipe"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"admin\.key in the data directory cannot be made"):
        operator_key(Settings(data_dir=tmp_path / "file"))


def test_same_secret_takes_any_text() -> None:
    secret = new_secret()
    assert same_secret(secret, secret)
    assert not any(same_secret(other, secret) for other in ["", "é", "\ud800", secret[:-1], "x" * 8192])
