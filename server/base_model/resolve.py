"""Which folder holds the base model: the default model's, a local one, or a hub snapshot. No torch here.

It finds and fetches; whether the engine can serve what lies there is `support`'s question.
"""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from server.base_model.atomic_folders import write_whole
from server.base_model.default_model import NAME, ensure_default_model
from server.errors import StartupError
from server.settings import Settings

# weights as safetensors, configs, tokenizers, chat templates; never a pickle, never code
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*)?")


def resolve_model(settings: Settings) -> Path:
    """The folder of `settings.model`, complete. Fetches at most once; later calls need no network.

    Raises StartupError when it is neither the default model, nor a folder, nor a hub id that can be had.
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
    """A folder with the model's config.json, and with its weights only if they are here already.

    Raises StartupError as `resolve_model` does. The default model comes whole: it is small.
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

    The commit seen first is pinned in the data directory: a restart serves the base its adapters were made
    for. The pin is written after the last file, so a cut fetch is never taken for a whole one.
    """
    name, _, revision = model.partition("@")
    pin = data_dir / "models" / f"{model.replace('/', '--')}.revision"
    try:
        if pin.exists():
            revision = pin.read_text().strip()
            try:
                return Path(snapshot_download(name, revision=revision, local_files_only=True))
            except LocalEntryNotFoundError:  # the hub's cache was emptied: the same commit again
                return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_WANTED))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _not_fetched(model, error) from error
    pin.parent.mkdir(parents=True, exist_ok=True)
    write_whole(pin, folder.name)
    return folder
