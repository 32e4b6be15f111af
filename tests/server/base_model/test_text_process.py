"""A process without torch reads each tokenizer as a process with torch does, and as transformers does."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from server.base_model.tokenizer import Tokenizer
from tests.server.api.generation.tokenizers import byte_level_tokenizer
from tests.server.base_model.families import CHATML, KINDS, TEMPLATES, tokenizer_of
from tests.server.base_model.text_process import TEXTS, describe

CLASSES = {  # transformers builds these anew from the folder's vocabulary: its tables say which and how
    "LlamaTokenizer": "prepend",
    "GemmaTokenizer": "prepend",
    "Qwen2Tokenizer": "bytes",
    "GPT2Tokenizer": "bytes",
}
HEAVY = {"torch", "numba", "accelerate", "transformers.modeling_utils"}


def test_a_process_without_torch_reads_every_tokenizer_alike(smollm2: Path, tmp_path: Path) -> None:
    folders = [smollm2, *_folders(tmp_path)]
    command = [sys.executable, "-m", "tests.server.base_model.text_process", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert "torch" in sys.modules, "this process is of the other kind"
    for folder, found in zip(folders, said["tokenizers"], strict=True):
        assert found == describe(Tokenizer.load(folder)), folder.name
        assert found["ids"] == AutoTokenizer.from_pretrained(str(folder))(list(TEXTS)).input_ids, folder.name
    modules = set(said["modules"])
    assert "transformers" in modules
    assert not modules & HEAVY
    assert not {name for name in modules if name.startswith("transformers.models.") and "modeling" in name}
    assert "PyTorch" not in done.stderr


def _folders(root: Path) -> list[Path]:
    """Each kind and template; classes by name; templates in a file of their own and listed by name."""
    byte_level_tokenizer(root / "small")
    for number, (name, template) in enumerate(TEMPLATES.items()):
        kind = [*KINDS][number % len(KINDS)]
        tokenizer_of(kind, template)._hf.save_pretrained(root / f"{kind}-{name}")
    for name, kind in CLASSES.items():
        tokenizer_of(kind, CHATML)._hf.save_pretrained(root / name)
        _change(root / name, tokenizer_class=name)
    listed = root / "listed"
    tokenizer_of("bytes", CHATML)._hf.save_pretrained(listed)
    (listed / "chat_template.jinja").unlink()
    templates = {"default": TEMPLATES["llama3"], "tool_use": TEMPLATES["qwen3"]}
    _change(listed, chat_template=[{"name": name, "template": text} for name, text in templates.items()])
    return sorted(root.iterdir())


def _change(folder: Path, **fields: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
