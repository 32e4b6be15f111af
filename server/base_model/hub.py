"""Base models from a hub, in the hub's own cache. Loading the hub's client takes a third of a second."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from server.atomic_files import replace_file
from server.errors import StartupError

# weights as safetensors, configs, tokenizers, chat templates; never a pickle, never code
_FILES_TO_FETCH = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def fetch_model(model: str, data_dir: Path) -> Path:
    """The snapshot of `owner/name[@revision]` in the hub's own cache.

    The first commit fetched is recorded in the data directory: a restart serves the base that its adapters
    were made for. The record is written after the last file, so an interrupted fetch leaves none.
    Raises StartupError if it cannot be fetched.
    """
    name, _, revision = model.partition("@")
    commit_file = data_dir / "models" / f"{model.replace('/', '--')}.revision"
    try:
        if commit_file.exists():
            revision = commit_file.read_text().strip()
            try:
                return Path(snapshot_download(name, revision=revision, local_files_only=True))
            except LocalEntryNotFoundError:  # the hub's cache was emptied: fetch the same commit again
                return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES_TO_FETCH))
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES_TO_FETCH))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _not_fetched(model, error) from error
    commit_file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(commit_file, folder.name.encode())
    return folder


def fetch_config(model: str) -> Path:
    """A folder with the config.json of `owner/name[@revision]`, without weights. Raises StartupError."""
    name, _, revision = model.partition("@")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision or None)).parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _not_fetched(model, error) from error


def _not_fetched(model: str, error: Exception) -> StartupError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return StartupError(f"--model {model!r} could not be fetched from the hub: {reason}")
