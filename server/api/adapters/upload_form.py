"""The multipart form of an adapter upload, and the file names it may hold. Reads no file's content."""

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
    """Fields and files of an upload: CONFIG, one of WEIGHTS and perhaps INTERFACE."""
    return Form(
        fields=("name", "sha256", "allow_noop"),
        file="files",
        max_bytes=settings.max_upload_bytes,
        max_files=settings.max_upload_files,
        keep=kept,
    )


def kept(name: str) -> bool:
    """Whether an adapter needs the file; False for known by-products. Raises UnsupportedMedia."""
    if why_ignored(name):
        return False
    if name not in (CONFIG, INTERFACE, *WEIGHTS):
        raise UnsupportedMedia(
            f"The file {shown(name)} is none of {CONFIG}, {INTERFACE}, {', '.join(WEIGHTS)}.", param="files"
        )
    return True


def check_files(names: Iterable[str]) -> str:
    """The name of the weights file. Raises InvalidAdapter unless `names` make an adapter."""
    uploaded = set(names)
    weights = [name for name in WEIGHTS if name in uploaded]
    if CONFIG not in uploaded or len(weights) != 1:
        raise InvalidAdapter(f"An upload needs {CONFIG} and one of {' or '.join(WEIGHTS)}.", param="files")
    return weights[0]
