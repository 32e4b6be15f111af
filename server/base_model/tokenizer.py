"""The tokenizer of a base: text to token ids and back, and the chat template.

Serving and training use the same one, so the same text has the same tokens in both. The template comes from
the model's folder: no text of a caller is compiled or rendered as one.

transformers reads the folder, since its tables say which tokenizer class a folder needs. It imports torch if
torch can be imported; a process that needs no model calls `forbid_torch` first.
"""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers.pre_tokenizers import ByteLevel

from server.base_model.control_tokens import MARK, ControlTokens
from server.errors import InvalidRequest, StartupError

# of a tokenizer's config, what `info` tells
_INFO = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "legacy",
    "padding_side",
    "split_special_tokens",
)
CONTEXT_CHARS = 64  # before a part of a text: they may change its tokens


def forbid_torch() -> None:
    """Make `import torch` fail in this process from now on: transformers then reads tokenizers without it.

    Saves 230 MB and 1,500 modules. Call it before anything imports torch or transformers.
    """
    assert "torch" not in sys.modules, "torch is imported already"
    assert "transformers" not in sys.modules, "transformers has looked for torch already"
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    # without this, transformers logs the advice to install torch
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in str(record.msg))


class Tokenizer:
    """A model folder's tokenizer. Immutable after `load`, so threads may share it."""

    def __init__(self, hf: Any, chat_template: str | None) -> None:
        backend = hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._hf = hf
        self._backend = backend  # its own encode and decode change no state, unlike transformers'
        self._chat_template = chat_template
        self.byte_level = _is_byte_level(json.loads(backend.to_str())["decoder"])
        self._literals = [token or "" for token in hf.convert_ids_to_tokens(list(range(len(hf))))]
        self.longest = max(map(len, self._literals))  # no token has more characters
        self._special = {i for i, token in hf.added_tokens_decoder.items() if token.special}
        self.pieces = [self._piece(i) for i in range(len(self._literals))]
        self.end: int | None = hf.eos_token_id
        self.lead = self.encode("")  # the tokens before every prompt
        self._control = ControlTokens(backend, chat_template or "", self._plain_chat())

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `folder`. Raises StartupError for a tokenizer that is missing, damaged or not supported."""
        from transformers import AutoTokenizer  # here, because it takes a second, and torch unless forbidden

        try:
            hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # what transformers raises for a damaged file
            raise StartupError(
                f"The model folder {folder.name!r} has no tokenizer that can be loaded."
            ) from error
        if not hf.is_fast:
            raise StartupError("This model's tokenizer has no tokenizer.json and is not supported.")
        return cls(hf, hf.chat_template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a raw `text`, in which control tokens such as <|im_end|> count as such.

        `special`: with the tokens that the tokenizer adds to every prompt.
        """
        # as a batch of one: the other `encode` holds the GIL, for seconds on a long text
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of what `render_chat` returned, or of a part: control tokens in messages are text.

        Raises InvalidRequest if the tokenizer can read a control token's text as nothing else.
        """
        return self._control.encode(rendered) if MARK in rendered else self.encode(rendered, special=False)

    def encode_part(self, text: str, start: int, stop: int, *, chat: bool = False) -> list[int]:
        """Token ids of text[start:stop] as they are in the whole text; `chat`: the text is a rendered chat.

        If a token crosses `start`, the ids are those after a line break: at the beginning of a text,
        SentencePiece would add a space.
        """
        encode = self.encode_chat if chat else partial(self.encode, special=False)
        part = text[start:stop]
        for before in (text[max(0, start - CONTEXT_CHARS) : start], "\n"):
            first, both = encode(before), encode(before + part)
            if both[: len(first)] == first:
                return both[len(first) :]
        return encode(part)

    def up_to_special(self, text: str) -> int | None:
        """How many characters of `text` end with its first special token; None if it has none."""
        found = (self._literals[i] for i in self.encode(text, special=False) if i in self._special)
        literal = next(found, None)
        return None if literal is None else text.index(literal) + len(literal)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of these tokens, without special ones or with them."""
        # as a batch of one: the other `decode` holds the GIL
        texts: list[str] = self._backend.decode_batch([list(ids)], skip_special_tokens=not special)
        return texts[0]

    def literals(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary writes them; "" for an id that it lacks."""
        return [self._literals[i] if i < len(self._literals) else "" for i in ids]

    def info(self) -> dict[str, Any]:
        """Class, special tokens and chat template, and what its config says of added tokens and spaces."""
        said = {name: self._hf.init_kwargs[name] for name in _INFO if name in self._hf.init_kwargs}
        return {
            "tokenizer_class": type(self._hf).__name__,
            "chat_template": self._chat_template,
            **self._hf.special_tokens_map,
            **{name: value for name, value in said.items() if isinstance(value, bool | str)},
        }

    def render_chat(
        self, messages: list[dict[str, str]], *, answer: bool = True, open_end: bool = False
    ) -> str:
        """`messages` rendered by the model's template, for `encode_chat`: control tokens in them are quoted.

        `answer`: with the beginning of the assistant's next message. `open_end`: the last message does not
        end, so that the answer continues it. Raises InvalidRequest if there is no
        template, or if it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "The base model has no chat template; use /v1/completions.", param="messages"
            )
        return self._render([self.quoted(message) for message in messages], answer, open_end)

    def quoted(self, message: dict[str, str]) -> dict[str, str]:
        """`message` with control tokens quoted in every field but the role, which is checked before."""
        role = message["role"]
        return {
            name: text if name == "role" else self._control.quoted(text, role)
            for name, text in message.items()
        }

    def _plain_chat(self) -> str:
        """A rendered chat in which each message is MARK; "" if there is no template, or it refuses that."""
        system, user, answer = ({"role": role, "content": MARK} for role in ("system", "user", "assistant"))
        for messages in ([system, user, answer, user], [user, answer, user]):
            with suppress(Exception):  # `render_chat` reports what a template raises
                return self._render(messages, answer=False) if self._chat_template else ""
        return ""

    def _render(self, messages: list[dict[str, str]], answer: bool, open_end: bool = False) -> str:
        try:
            text: str = self._hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer, continue_final_message=open_end
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except ValueError:
            if not open_end:
                raise
            raise InvalidRequest(
                "The model's chat template cannot leave the last message open.",
                param="continue_final_message",
            ) from None
        return text

    def token_text(self, token: int) -> tuple[str, bytes]:
        """A token's text and bytes for logprobs; ("", b"") for an id that does not exist.

        The text of a token that is part of a character is `bytes:\\xe2\\x80`, as OpenAI writes it.
        """
        if not 0 <= token < len(self.pieces):
            return "", b""
        piece = self._literals[token] if token in self._special else self.pieces[token]
        raw = piece.encode() if isinstance(piece, str) else piece
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    @cached_property
    def all_pieces(self) -> list[bytes | str]:
        """`pieces`, and special tokens as they are written."""
        return [self._literals[i] if i in self._special else piece for i, piece in enumerate(self.pieces)]

    def _piece(self, token: int) -> bytes | str:
        """What a token adds to a text: bytes, perhaps part of a character, or a whole text."""
        literal = self._literals[token]
        if token in self._special:
            return b""
        if self.byte_level:
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


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
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
