"""Settings reach a child process as they are, and a bad one is refused by name."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import LONGEST_RUN_DIR, Settings, child_environment, inherited_environment


def test_a_child_builds_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        port=1234, data_dir=tmp_path / "with space", prefix_cache=False, kv_bytes=5 << 20, drain_seconds=0.5
    )
    monkeypatch.setenv("POLYPEFT_STORE", "of the parent's shell")
    for name in [name for name in os.environ if name.startswith("POLYPEFT_")]:
        monkeypatch.delenv(name)
    for name, value in settings.to_env().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_a_childs_environment_replaces_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYPEFT_STORE", "stale")
    monkeypatch.setenv("POLYPEFT_API_KEY", "secret")
    monkeypatch.setenv("KEPT", "yes")
    environment = child_environment(Settings(store=None, port=5))
    assert environment["POLYPEFT_PORT"] == "5"
    assert environment["KEPT"] == "yes"
    assert not {"POLYPEFT_STORE", "POLYPEFT_API_KEY"} & environment.keys()
    assert not any(name.startswith("POLYPEFT_") for name in inherited_environment())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65536),
        ("max_seqs", 0),
        ("kv_bytes", 1),
        ("device", "tpu"),
        ("drain_seconds", -1),
        ("model", ""),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as refusal:
        Settings(**{name: value})  # type: ignore[arg-type]
    assert refusal.value.errors()[0]["loc"] == (name,)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError):
        Settings(prot=8000)  # type: ignore[call-arg]


def test_every_setting_has_its_help() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_sockets_lie_in_the_data_directory_if_they_can(tmp_path: Path) -> None:
    assert Settings(data_dir=Path("data")).run_dir == Path.cwd() / "data" / "run"
    deep = Settings(data_dir=tmp_path / ("d" * 120))
    assert len(os.fsencode(deep.run_dir)) <= LONGEST_RUN_DIR
    assert deep.run_dir == Settings(data_dir=deep.data_dir).run_dir
    assert deep.run_dir != Settings(data_dir=tmp_path / ("e" * 120)).run_dir
