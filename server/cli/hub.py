"""Fetches an adapter's files from the hub, for `admin import`. The server itself never does."""

import re
from pathlib import Path

from server.errors import InvalidField

# only these names are fetched: a repository may hold anything, also pickles and code
ADAPTER_FILES = [
    "adapter_config.json",
    "adapter_interface.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")


def fetch_adapter(model: str, folder: Path) -> list[Path]:
    """Fetch the adapter `owner/name[@revision]` into `folder`; returns its files.

    Raises InvalidField for what is no hub id, cannot be fetched, or holds no adapter as safetensors.
    """
    if not _HUB_ID.fullmatch(model):
        raise InvalidField(f"{model!r} is no hub id like owner/name or owner/name@revision.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = model.partition("@")
    try:
        snapshot_download(name, revision=revision or None, allow_patterns=ADAPTER_FILES, local_dir=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidField(f"{model!r} could not be fetched from the hub: {reason}") from error
    files = [folder / file for file in ADAPTER_FILES if (folder / file).is_file()]
    if not any(path.suffix == ".safetensors" for path in files):
        raise InvalidField(f"{model!r} holds no {' or '.join(ADAPTER_FILES[2:])}; a pickle is not fetched.")
    return files
