"""Which files make an adapter's upload, and the form they come in. Knows nothing of their contents."""

from server.adapters.formats.convert import PICKLES
from server.api.multipart import Form
from server.errors import UnsupportedMedia, shown
from server.settings import Settings

CONFIG = "adapter_config.json"
INTERFACE = "adapter_interface.json"
WEIGHTS = ("adapter_model.safetensors", "adapter.safetensors", *PICKLES)
IGNORED_ENDINGS = (".md", ".txt", ".jinja", ".gitattributes")  # what save_pretrained writes beside
IGNORED = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
    | {"head_config.json", "model_head.safetensors", "pytorch_model_head.bin"}  # the base has its own head
)


def adapter_form(settings: Settings) -> Form:
    """Its files come under CONFIG, one of WEIGHTS and perhaps INTERFACE, as far as they come."""
    return Form(
        fields=("name", "sha256", "allow_noop"),
        file="files",
        max_bytes=settings.max_upload_bytes,
        max_files=settings.max_upload_files,
        keep=_keep,
    )


def _keep(name: str) -> bool:
    if name.endswith(IGNORED_ENDINGS) or name in IGNORED:
        return False
    if name not in (CONFIG, INTERFACE, *WEIGHTS):
        raise UnsupportedMedia(
            f"The file {shown(name)} is none of {CONFIG}, {INTERFACE}, {', '.join(WEIGHTS)}.", param="files"
        )
    return True
