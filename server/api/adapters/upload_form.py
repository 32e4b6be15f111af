"""Which files make an adapter's upload, and the form they come in. Knows nothing of what is in them."""

from collections.abc import Iterable

from server.adapters.formats.ignored_files import why_ignored
from server.adapters.formats.pickle_sandbox import PICKLES
from server.api.http.multipart import Form
from server.errors import InvalidAdapter, UnsupportedMedia, shown
from server.settings import Settings

CONFIG = "adapter_config.json"
INTERFACE = "adapter_interface.json"
WEIGHTS = ("adapter_model.safetensors", "adapter.safetensors", *PICKLES)


def adapter_form(settings: Settings) -> Form:
    """Its files come under CONFIG, one of WEIGHTS and perhaps INTERFACE, as far as they come."""
    return Form(
        fields=("name", "sha256", "allow_noop"),
        file="files",
        max_bytes=settings.max_upload_bytes,
        max_files=settings.max_upload_files,
        keep=kept,
    )


def kept(name: str) -> bool:
    """Whether an adapter needs the file. Raises UnsupportedMedia for one that has no business here."""
    if why_ignored(name):
        return False
    if name not in (CONFIG, INTERFACE, *WEIGHTS):
        raise UnsupportedMedia(
            f"The file {shown(name)} is none of {CONFIG}, {INTERFACE}, {', '.join(WEIGHTS)}.", param="files"
        )
    return True


def check_files(names: Iterable[str]) -> str:
    """Which of them holds the weights. Raises InvalidAdapter unless they make an adapter."""
    given = set(names)
    weights = [name for name in WEIGHTS if name in given]
    if CONFIG not in given or len(weights) != 1:
        raise InvalidAdapter(f"An upload needs {CONFIG} and one of {' or '.join(WEIGHTS)}.", param="files")
    return weights[0]
