"""Two small tokenizers, of the two kinds in use: bytes (GPT-2, Llama 3, Qwen) and byte fallback (Llama 2)."""

from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.base_model.tokenizer import Tokenizer

TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('roles must begin with user') }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["he", "ll", "hell", "hello", "Ġw", "Ġwo"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o")]
VOCABULARY = 256 + len(WORDS) + 4


def byte_level_tokenizer(folder: Path | None = None) -> Tokenizer:
    """256 bytes, six merges, four special tokens, a chat template. Saved to `folder` if given."""
    alphabet = list(bytes_to_unicode().values())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *WORDS])}
    backend = Backend(models.BPE(vocabulary, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)
    if folder is not None:
        hf.save_pretrained(folder)
    return Tokenizer(hf, TEMPLATE)


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece's way: a few whole characters, all else as <0xNN>; a space is U+2581."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "a", "b", "x", "é", "\u2581a", "ab"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(
        models.BPE(
            vocabulary, [("\u2581", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), None)
