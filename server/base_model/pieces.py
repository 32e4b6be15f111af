"""What the tokens of a vocabulary add to a text: bytes of UTF-8, or text with byte fallback."""

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from server.errors import StartupError


def is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether tokens are bytes (GPT-2, Llama 3, Qwen); else text with byte fallback (Llama 2, Gemma).

    Raises StartupError for a decoder of another kind.
    """
    parts = (decoder or {}).get("decoders", [decoder or {"type": "none"}])
    kinds = {part["type"] for part in parts}
    if not kinds & {"ByteLevel", "ByteFallback"}:
        raise StartupError(
            f"This model's tokenizer decodes by {'+'.join(sorted(kinds))}, which is not supported."
        )
    return "ByteLevel" in kinds


def piece_of(literal: str, *, byte_level: bool) -> bytes | str:
    """What a token that is written so adds to a text: bytes, perhaps part of a character, or a whole text."""
    if byte_level:
        known = all(char in _BYTES for char in literal)
        return bytes(_BYTES[char] for char in literal) if known else literal.encode()
    if len(literal) == 6 and literal.startswith("<0x") and literal.endswith(">"):
        return bytes([int(literal[3:5], 16)])
    return literal.replace("\u2581", " ")


def _byte_characters() -> dict[str, int]:
    """The byte that each character of GPT-2's alphabet means. Printable ones mean themselves."""
    alphabet = sorted(ByteLevel.alphabet())
    bytes_ = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = sorted(set(range(256)) - set(bytes_.values()))
    return bytes_ | dict(zip(alphabet[len(bytes_) :], others, strict=True))


_BYTES = _byte_characters()
