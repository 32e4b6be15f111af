"""Files that libraries save beside an adapter and the server ignores, with the reason for each."""

from collections.abc import Iterable

_TOKENIZER = "prompts are tokenised with the base model's tokenizer; tokens added in training are not known"
_TEMPLATE = "chats are rendered with the base model's chat template"
_HEAD = "the base model's own head is used"
_TRAINING = "it tells how training went, not what was learned"
_NOTE = "it is not needed to run the adapter"

_REASONS = {
    **dict.fromkeys(
        (
            "added_tokens.json",
            "merges.txt",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "vocab.json",
            "vocab.txt",
        ),
        _TOKENIZER,
    ),
    **dict.fromkeys(("chat_template.jinja", "chat_template.json"), _TEMPLATE),
    **dict.fromkeys(("head_config.json", "model_head.safetensors", "pytorch_model_head.bin"), _HEAD),
    **dict.fromkeys(("trainer_state.json", "training_args.bin"), _TRAINING),
    **dict.fromkeys(("config.json", "generation_config.json"), "the base model's own is used"),
}
_BY_ENDING = {".jinja": _TEMPLATE, ".md": _NOTE, ".txt": _NOTE, ".gitattributes": _NOTE}
CHANGES_PROMPTS = frozenset({_TOKENIZER, _TEMPLATE})


def why_ignored(name: str) -> str | None:
    """Why a file of this name is ignored; None if it is not a known file of this kind."""
    reason = _REASONS.get(name)
    return reason or next((why for ending, why in _BY_ENDING.items() if name.endswith(ending)), None)


def ignored(names: Iterable[str]) -> list[dict[str, str]]:
    """Those of the files that are ignored, each once, as {"file", "reason"}."""
    reasons = {name: why for name in names if (why := why_ignored(name))}
    return [{"file": name, "reason": why} for name, why in reasons.items()]
