import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import StartupError
from server.tenancy.keys import new_secret, operator_key, same_secret, well_formed


def test_the_operators_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    secret, created = operator_key(folder)
    assert created
    assert well_formed(secret)
    assert operator_key(folder) == (secret, False)
    assert stat.S_IMODE((folder / "admin.key").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["admin.key"]


def test_of_many_starts_at_once_one_makes_the_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: operator_key(tmp_path), range(64)))
    assert len({secret for secret, _ in made}) == 1
    assert sum(created for _, created in made) == 1


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\xff\xfe"])
def test_a_damaged_key_stops_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "admin.key").write_bytes(content)
    with pytest.raises(StartupError, match=r"admin\.key"):
        operator_key(tmp_path)


def test_same_secret_takes_any_text() -> None:
    secret = new_secret()
    assert same_secret(secret, secret)
    assert not any(same_secret(other, secret) for other in ["", "é", "\ud800", secret[:-1], "x" * 8192])
