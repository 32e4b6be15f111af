"""Which folder holds the base model: the default model's, a local one, or a hub snapshot. No torch here.

Whether the engine can serve the model is checked by compatibility.py.
"""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from server.atomic_files import replace_file
from server.base_model.default_model import NAME, ensure_default_model
from server.errors import StartupError
from server.settings import Settings

# weights as safetensors, configs, tokenizers, chat templates; never a pickle, never code
_FILES_TO_FETCH = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*)?")


def resolve_model(settings: Settings) -> Path:
    """The folder of `settings.model`, complete. Fetches at most once; later calls need no network.

    Raises StartupError if it is neither the default model, nor a folder, nor a hub id that can be fetched.
    """
    if settings.model == NAME:
        return ensure_default_model(settings.data_dir)
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if not _HUB_ID.fullmatch(settings.model):
        raise StartupError(
            f"--model {settings.model!r} is neither {NAME!r}, nor a folder, nor a hub id like 'owner/name'."
        )
    return _from_hub(settings.model, settings.data_dir)


def resolve_config(settings: Settings) -> Path:
    """A folder with the model's config.json. Weights of a hub model are not fetched for it.

    Raises StartupError as `resolve_model` does. The default model is small and fetched completely.
    """
    if settings.model == NAME or not _HUB_ID.fullmatch(settings.model) or Path(settings.model).is_dir():
        return resolve_model(settings)
    name, _, revision = settings.model.partition("@")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision or None)).parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _not_fetched(settings.model, error) from error


def _not_fetched(model: str, error: Exception) -> StartupError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return StartupError(f"--model {model!r} could not be fetched from the hub: {reason}")


def _from_hub(model: str, data_dir: Path) -> Path:
    """The snapshot of `owner/name[@revision]` in the hub's own cache.

    The first commit fetched is recorded in the data directory: a restart serves the base that its adapters
    were made for. The record is written after the last file, so an interrupted fetch leaves none.
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
