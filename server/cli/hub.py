"""An adapter's files from the hub, for the operator's own tooling: no server and no tenant can cause this."""

import re
from pathlib import Path

from server.errors import InvalidField

# by exact name: a repository may hold anything, pickles and code among it, and of that nothing is fetched
WANTED = ["adapter_config.json", "adapter_interface.json", "adapter_model.safetensors", "adapter.safetensors"]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")


def fetch(model: str, folder: Path) -> list[Path]:
    """The files of `owner/name[@revision]` that make an adapter, into `folder`.

    Raises InvalidField when it is no hub id, cannot be had, or holds no adapter as safetensors.
    """
    if not _HUB_ID.fullmatch(model):
        raise InvalidField(f"{model!r} is no hub id like owner/name or owner/name@revision.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    name, _, revision = model.partition("@")
    try:
        snapshot_download(name, revision=revision or None, allow_patterns=WANTED, local_dir=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidField(f"{model!r} could not be fetched from the hub: {reason}") from error
    found = [folder / file for file in WANTED if (folder / file).is_file()]
    if not any(path.suffix == ".safetensors" for path in found):
        raise InvalidField(f"{model!r} holds no {' or '.join(WANTED[2:])}; a pickle is not fetched.")
    return found
