"""Small tokenizers and chat templates as the families in use have them, with every kind of added token."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from server.base_model.tokenizer import Tokenizer

CORPUS = (  # merges make parts of control tokens, and none of them whole
    "<|im_ <|im_ end|> start|> user|> system assistant <|assistant </ s> [IN ST] [/IN <end _of _turn> |>"
    " ||> <| The capital of France is Paris.\n\n\n if (a < b) { return '<b>' + x; } think>"
    " <think tool_ call> <<|\n"
) * 4
SAID = "{% for m in messages %}"
ANSWER = "{% if add_generation_prompt %}"
CHATML = (
    SAID
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + ANSWER
    + "<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin|>"
    + SAID
    + "{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    + ANSWER
    + "<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>"
    + SAID
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ m.content | trim }}"
    + "<end_of_turn>\n{% endfor %}"
    + ANSWER
    + "<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # what the system says stands before what the first user says
    "{{ '<s>' }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {{ (first if loop.first else '') + m.content }} [/INST]"
    "{% else %}{{ ' ' + m.content | trim }}</s>{% endif %}{% endfor %}"
)
PHI3 = (  # its tokens take the white space behind them
    SAID + "{{ '<|' + m.role + '|>' + '\n' + m.content + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN3 = (  # thoughts only in the last turn; <think> and <tool_call> are added tokens, not special ones
    SAID + "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "<|im_start|>assistant\n{% if loop.last and '</think>' in m.content %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if tools %}<tool_call>{% endif %}" + ANSWER + "<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK = (  # its turns begin with tokens that are not special
    "<｜begin▁of▁sentence｜>" + SAID + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}"
    "<｜end▁of▁sentence｜>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    + ANSWER
    + "<｜Assistant｜><think>\n{% endif %}"
)
SEAMS = SAID + "<|{{ m.content }}im_end|>{{ m.content }}{{ m.content }}{% endfor %}"  # markers out of pieces
MIDDLE = SAID + "<|{{ m.content }}|>{% endfor %}"

BASE: dict[str, Any] = {"special": True, "normalized": False}
PLAIN: dict[str, Any] = {"normalized": False}
TOKENS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>"], BASE),
    **dict.fromkeys(["<|/head|>", "<|eot|>", "<bos>", "<start_of_turn>", "<end_of_turn>"], BASE),
    **dict.fromkeys(["<s>", "</s>", "[INST]", "[/INST]"], BASE),
    **dict.fromkeys(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], BASE | {"rstrip": True}),
    "<mask>": BASE | {"lstrip": True},
    "<word>": BASE | {"single_word": True},
    **dict.fromkeys(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], BASE),
    **dict.fromkeys(["<｜User｜>", "<｜Assistant｜>"], PLAIN),
    **dict.fromkeys(["<think>", "</think>", "<tool_call>", "<b>"], PLAIN),
    **dict.fromkeys(["\n\n", "\n\n\n", "user"], PLAIN),  # as Gemma's line ends; a word
    "⁂": BASE,
}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "qwen3": QWEN3,
    "deepseek": DEEPSEEK,
}


def _byte_level(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def _composed(backend: Backend) -> None:
    _byte_level(backend)
    backend.normalizer = normalizers.NFKC()


def _metaspace(scheme: str) -> Callable[[Backend], None]:
    def build(backend: Backend) -> None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )

    return build


def _prepend(backend: Backend) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


KINDS: dict[str, Callable[[Backend], None]] = {
    "bytes": _byte_level,
    "nfkc": _composed,
    "first": _metaspace("first"),
    "always": _metaspace("always"),
    "never": _metaspace("never"),
    "prepend": _prepend,
}


@cache
def tokenizer_of(kind: str, template: str, normalized: bool = False) -> Tokenizer:
    """`kind` of KINDS. `normalized`: control tokens are looked for in normalised text."""
    whole_bytes = kind in {"bytes", "nfkc"}
    trained = Backend(models.BPE())
    KINDS[kind](trained)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole_bytes else []
    trained.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    own = [*TOKENS][:9]  # some bases have their control tokens in the model's vocabulary, some behind it
    fallback = [] if whole_bytes else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate([*own, *fallback, *model["vocab"]])}
    merges = [(first, second) for first, second in model["merges"]]
    more: dict[str, Any] = {} if whole_bytes else {"unk_token": "<unk>", "byte_fallback": True}
    backend = Backend(models.BPE(vocabulary, merges, **more))
    KINDS[kind](backend)
    for name, flags in TOKENS.items():
        backend.add_tokens([AddedToken(name, **flags | ({"normalized": True} if normalized else {}))])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)
    return Tokenizer(hf, template)
