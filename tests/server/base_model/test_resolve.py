"""Which folder --model means."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import server.base_model.hub
from server.base_model.resolve import resolve_model
from server.errors import StartupError
from server.settings import Settings


class Hub:
    """snapshot_download over a folder of our own; records what it was asked."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.calls: list[dict[str, Any]] = []
        self.online = True

    def __call__(self, name: str, **options: Any) -> str:
        self.calls.append({"name": name, **options})
        folder = self.cache / (options.get("revision") or "c0ffee")
        if options.get("local_files_only"):
            if not folder.is_dir():
                raise LocalEntryNotFoundError("not cached")
        elif not self.online:
            raise OSError("the hub did not answer")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "cache")
    monkeypatch.setattr(server.base_model.hub, "snapshot_download", fake)
    return fake


def settings(tmp_path: Path, model: str) -> Settings:
    return Settings(model=model, data_dir=tmp_path / "data")


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(settings(tmp_path, str(tmp_path))) == tmp_path


@pytest.mark.parametrize("model", ["./missing", "nonsense", "a/b/c", "owner/name?x"])
def test_what_is_none_of_the_three_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="neither"):
        resolve_model(settings(tmp_path, model))


def test_a_hub_model_is_pinned_and_then_needs_no_network(tmp_path: Path, hub: Hub) -> None:
    first = resolve_model(settings(tmp_path, "owner/name"))
    assert "*.safetensors" in hub.calls[0]["allow_patterns"]
    assert not {"*.bin", "*.pt", "*.py", "*"} & set(hub.calls[0]["allow_patterns"])
    hub.online = False
    assert resolve_model(settings(tmp_path, "owner/name")) == first
    assert hub.calls[-1]["revision"] == "c0ffee"


def test_an_emptied_cache_gets_the_same_commit_again(tmp_path: Path, hub: Hub) -> None:
    resolve_model(settings(tmp_path, "owner/name")).rmdir()
    assert resolve_model(settings(tmp_path, "owner/name")).name == "c0ffee"
    assert hub.calls[-1]["revision"] == "c0ffee"


def test_a_fetch_that_fails_is_a_sentence_and_pins_nothing(tmp_path: Path, hub: Hub) -> None:
    hub.online = False
    with pytest.raises(StartupError, match="did not answer"):
        resolve_model(settings(tmp_path, "owner/name@v1"))
    hub.online = True
    assert resolve_model(settings(tmp_path, "owner/name@v1")).name == "v1"
