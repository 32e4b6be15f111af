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

from server.base_model.chat_tools import ChatTools, probe
from server.base_model.control_tokens import MARK, ControlTokens
from server.base_model.pieces import is_byte_level, piece_of
from server.errors import InvalidRequest, StartupError

log = logging.getLogger(__name__)
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

    def __init__(
        self, hf: Any, chat_template: str | dict[str, str] | None, tool_format: str = "auto"
    ) -> None:
        """`tool_format`: how the model writes function calls (tool_formats/); auto: as its template does."""
        backend = hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._hf = hf
        self._backend = backend  # its own encode and decode change no state, unlike transformers'
        self._chat_template = chat_template
        self.byte_level = is_byte_level(json.loads(backend.to_str())["decoder"])
        self._literals = [token or "" for token in hf.convert_ids_to_tokens(list(range(len(hf))))]
        self.longest = max(map(len, self._literals))  # no token has more characters
        added = hf.added_tokens_decoder.items()
        self._special = {i for i, token in added if token.special}
        self._added = {token.content: (i, bool(token.special)) for i, token in added}
        self.pieces = [
            b"" if i in self._special else piece_of(literal, byte_level=self.byte_level)
            for i, literal in enumerate(self._literals)
        ]
        self.end: int | None = hf.eos_token_id
        self.lead = self.encode("")  # the tokens before every prompt
        source = _source(chat_template)
        roles = [("system", "user", "assistant", "user"), ("user", "assistant", "user")]
        chats = [self._sample([{"role": role, "content": MARK} for role in some]) for some in roles]
        self.tools = ChatTools(source, tool_format, takes_system=bool(chats[0]))
        self.pieces_with_markers = self._pieces_with_markers()
        plain_chat = next(filter(None, chats), "")
        self._control = ControlTokens(backend, source, [plain_chat, *self._tool_chats()])

    @classmethod
    def load(cls, folder: Path, tool_format: str = "auto") -> "Tokenizer":
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
        return cls(hf, hf.chat_template, tool_format)

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
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        answer: bool = True,
        open_end: bool = False,
    ) -> str:
        """`messages` rendered by the model's template, for `encode_chat`: control tokens in them are quoted.

        Messages as in chat_tools.py; `tools` are OpenAI's, the functions that may be called. `answer`: with
        the beginning of the assistant's next message. `open_end`: the last message does not end, so that the
        answer continues it. Raises InvalidRequest if there is no template, or if it refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "The base model has no chat template; use /v1/completions.", param="messages"
            )
        messages, tools = self.tools.prepared(messages, tools or [])
        quoted = [self.quoted(message) for message in messages]
        quoted_tools = None if tools is None else [self._quoted(tool) for tool in tools]
        try:
            return self._render(quoted, quoted_tools, answer=answer, open_end=open_end)
        except TemplateError as error:
            reason = str(error)
        except Exception as error:  # whatever an operation of the template raises on such values
            if open_end and isinstance(error, ValueError):  # what transformers raises, beside the template
                raise InvalidRequest(
                    "The model's chat template cannot leave the last message open.",
                    param="continue_final_message",
                ) from None
            log.debug("The chat template failed", exc_info=error)
            reason = "it fails on them"
        raise InvalidRequest(f"The model's chat template refuses these messages: {reason}", param="messages")

    def quoted(self, message: dict[str, Any]) -> dict[str, Any]:
        """`message` with control tokens quoted in every text but the role, which is checked before."""
        role = message["role"]
        return {
            name: value
            if name == "role"
            else self._control.quoted(value, role)
            if name == "content"
            else self._quoted(value)
            for name, value in message.items()
        }

    def _quoted(self, value: Any) -> Any:
        """A JSON value of a caller's with the control tokens in all its texts quoted."""
        if isinstance(value, str):
            return self._control.quoted(value, "tool")
        if isinstance(value, list):
            return [self._quoted(item) for item in value]
        if isinstance(value, dict):
            return {self._quoted(key): self._quoted(item) for key, item in value.items()}
        return value

    def _tool_chats(self) -> list[str]:
        """A chat with functions, calls and results as the template renders it; none if it does not."""
        if not self.tools.native:
            return []
        tool = {"name": MARK, "description": MARK, "parameters": {MARK: MARK}}
        tools = [{"type": "function", "function": tool}]
        if chat := self._sample(*self.tools.prepared(probe(MARK), tools)):
            return [chat]
        self.tools.take_text_arguments()
        chat = self._sample(*self.tools.prepared(probe(MARK), tools))
        return [chat] if chat else []

    def _sample(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """`messages` rendered; "" if there is no template, or it refuses them."""
        with suppress(Exception):  # `render_chat` reports what a template raises
            return self._render(messages, tools, answer=False) if self._chat_template else ""
        return ""

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        answer: bool,
        open_end: bool = False,
    ) -> str:
        text: str = self._hf.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=answer,
            continue_final_message=open_end,
        )
        return text

    def added_token(self, text: str) -> tuple[int, bool] | None:
        """Id of the added token of this text, and whether it is special; None if there is none."""
        return self._added.get(text)

    def _pieces_with_markers(self) -> list[bytes | str]:
        """`pieces` in which the markers of calls have their text, special tokens or not."""
        added = [self._added.get(marker, (0, False)) for marker in self.tools.format.markers]
        shown = {i for i, special in added if special}
        return self._showing(shown) if shown else self.pieces

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
        return self._showing(self._special)

    def _showing(self, tokens: set[int]) -> list[bytes | str]:
        """`pieces`, and these tokens as they are written."""
        return [self._literals[i] if i in tokens else piece for i, piece in enumerate(self.pieces)]


def _source(template: str | dict[str, str] | None) -> str:
    """The source of a template, or of all templates of a folder that has several."""
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""
