"""Which folder holds the base model: the default model's, a local one, or a hub snapshot. No torch here.

Whether the engine can serve the model is checked by compatibility.py.
"""

import re
from pathlib import Path

from server.base_model.default_model import NAME, ensure_default_model
from server.errors import StartupError
from server.settings import Settings

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
    from server.base_model.hub import fetch_model

    return fetch_model(settings.model, settings.data_dir)


def resolve_config(settings: Settings) -> Path:
    """A folder with the model's config.json. Weights of a hub model are not fetched for it.

    Raises StartupError as `resolve_model` does. The default model is small and fetched completely.
    """
    if settings.model == NAME or not _HUB_ID.fullmatch(settings.model) or Path(settings.model).is_dir():
        return resolve_model(settings)
    from server.base_model.hub import fetch_config

    return fetch_config(settings.model)
