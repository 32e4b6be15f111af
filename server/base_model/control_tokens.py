"""Control tokens of a base, such as <|im_end|>: in a chat only the template may write them.

A control token in a message is read as ordinary text, in two steps. Before the template is rendered, `quoted`
replaces a character of each control token in a message, so that neither template nor tokenizer sees one.
`encode` then makes token ids of the rendering: control tokens for what the template wrote, and ordinary
tokens for what was quoted, with its own characters again.

Control tokens are those that the tokenizer calls special, and those of its other added tokens that occur in
the template's source, such as <tool_call>. An assistant's message may contain the second kind, as answers do
(<think>), but not those that the template writes around messages.
"""

import re
import secrets
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from server.errors import InvalidRequest

MARK = "\ufdd0"  # precedes each quoted character; Unicode reserves it for a program's own use
OTHER_PLANE = 0x10000  # added to the code of a quoted character
_QUOTED = re.compile(f"{MARK}([\U00010000-\U0001ffff])")


class ControlTokens:
    """The control tokens of one tokenizer and chat template. Immutable, so threads may share it."""

    def __init__(self, backend: Any, template: str, chats: Sequence[str]) -> None:
        """`backend`: a tokenizers.Tokenizer. `template`: its source, "" if there is none.

        `chats`: rendered by the template, with MARK for each text; the first has plain messages only, and is
        "" if that fails; others may have function calls.
        """
        added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        ids = {i: token for i, token in added.items() if _is_control(token, template)}
        self._tokens = [token.content for token in ids.values()]
        self._finder = _finder(ids.values(), backend.normalizer)
        # Added to a control token's text for the reader. It is random, so no message can contain it.
        self._nonce = f"control{secrets.token_hex(16)}:"
        self._reader, self._real = self._build_reader(backend, added, ids.keys())
        unknown = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
        self._never_text = ids.keys() - self._real.keys() - {unknown}
        around_turns = {token for _, token in self._found(chats[0])}
        self._not_spoken = around_turns | {token.content for token in ids.values() if token.special}
        self._longest = max(map(len, self._tokens), default=0)
        self._heads = {token[:at] for token in self._tokens for at in range(1, len(token))}
        self._tails = {token[at:] for token in self._tokens for at in range(1, len(token))}
        # a template may put a message into the middle of a token, as <|...|>
        self._around = any(
            self._head_at_end(before) and self._tail_at_start(after)
            for chat in chats
            for before, after in pairwise(chat.split(MARK))
        )

    def quoted(self, text: str, role: str) -> str:
        """`text` with a character quoted in each control token, and in each part of one at its ends.

        What a template puts beside such a part could complete the token. `role`: who wrote the message.
        """
        control = self._not_spoken if role == "assistant" else None
        if MARK in text:
            text = _quote(text, {at for at, character in enumerate(text) if character == MARK})
        while spots := self._spelt(text, control):  # the rest of one token may be another
            text = _quote(text, spots)
        return text

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat, or a part of one, whose messages were `quoted`.

        Raises InvalidRequest if the tokenizer can read a control token's text as nothing else.
        """
        pieces, at = [], 0
        for start, _ in self._found(rendered):
            pieces += [rendered[at:start], self._nonce]
            at = start
        text = _QUOTED.sub(lambda quoted: _swap(quoted[1]), "".join([*pieces, rendered[at:]]))
        ids = self._reader.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if spelt := self._never_text.intersection(ids):
            token = self._reader.id_to_token(min(spelt))
            raise InvalidRequest(
                f"messages hold {token}, which the base's tokenizer cannot read as text.", param="messages"
            )
        return [self._real.get(i, i) for i in ids]

    def _spelt(self, text: str, control: set[str] | None) -> set[int]:
        """Indices of the characters to quote. `control`: the tokens that count; None: all."""
        spots = {at for at, token in self._found(text) if control is None or token in control}
        start, body = len(text) - len(text.lstrip()), text.strip()  # a template may strip it, too
        spots |= {start + at for at in self._head_at_end(body) | self._tail_at_start(body)}
        if self._around and 0 < len(body) < self._longest and any(body in token for token in self._tokens):
            spots.add(start)
        return spots

    def _head_at_end(self, text: str) -> set[int]:
        """Indices at which the beginning of a control token starts that the text's end cuts off."""
        return {
            len(text) - length
            for length in range(1, min(len(text) + 1, self._longest))
            if text[-length:] in self._heads
        }

    def _tail_at_start(self, text: str) -> set[int]:
        """Indices at which the end of a control token stops whose beginning lies before the text."""
        return {
            length - 1
            for length in range(1, min(len(text) + 1, self._longest))
            if text[:length] in self._tails
        }

    def _found(self, text: str) -> list[tuple[int, str]]:
        """(start, text) of every control token in `text`, as the base's tokenizer finds them."""
        if not any(self._finder.encode_batch_fast([text])[0].ids):  # ten times as fast, without offsets
            return []
        found = self._finder.encode_batch([text])[0]
        return [
            (start + len(text[start:stop]) - len(text[start:stop].lstrip()), self._tokens[i - 1])
            for i, (start, stop) in zip(found.ids, found.offsets, strict=True)
            if i
        ]

    def _build_reader(
        self, backend: Any, added: dict[int, AddedToken], control: Iterable[int]
    ) -> tuple[Any, dict[int, int]]:
        """A tokenizer that knows each control token by nonce and text, and {its id: the base's id}.

        It shares the base tokenizer's model, so the vocabulary is in memory once.
        """
        reader: Any = Backend(backend.model)
        reader.normalizer, reader.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        control, real = set(control), dict[int, int]()
        for i, token in sorted(added.items()):
            name = self._nonce + token.content if i in control else token.content
            flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
            reader.add_tokens([AddedToken(name, normalized=token.normalized, **flags)])
            own = reader.token_to_id(name)
            assert own is not None, "it was just added"
            real[own] = i
        return reader, real


def _is_control(token: AddedToken, template: str) -> bool:
    """Whether an added token is a control token: words and white space never are, whatever the template."""
    content = token.content.strip()
    return bool(content) and (token.special or (token.content in template and not content.isalnum()))


def _finder(tokens: Iterable[AddedToken], normalizer: Any) -> Any:
    """A tokenizer that gives `tokens` the ids 1, 2, ... and all other text 0."""
    finder = Backend(models.WordLevel({"": 0}, unk_token=""))
    finder.normalizer = normalizer
    finder.add_tokens([AddedToken(token.content, normalized=token.normalized) for token in tokens])
    return finder


def _quote(text: str, spots: set[int]) -> str:
    """`text` with the characters at these indices quoted."""
    pieces, done = [], 0
    for at in sorted(spots):
        pieces += [text[done:at], MARK, _swap(text[at])]
        done = at + 1
    return "".join([*pieces, text[done:]])


def _swap(character: str) -> str:
    """A quoted character for a plain one, and the other way round."""
    return chr(ord(character) ^ OTHER_PLANE)
