"""One choice of an answer: turns the engine's tokens into text, ends it at stop strings, and keeps logprobs.

Knows no HTTP and no JSON. The pieces are the same whether streamed or not; joined they are the whole text.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from server.api.generation.detokenizer import detokenizer
from server.api.generation.stop_strings import StopScanner
from server.base_model.tokenizer import Tokenizer
from server.messages import Chunk, TokenLogprobs

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenInfo:
    """A generated token, or the one that ended the choice, with its logprobs."""

    token: int
    logprobs: TokenLogprobs
    offset: int  # characters of the choice's text before it


@dataclass(frozen=True)
class Piece:
    """Text and tokens that a chunk added to a choice. `finish` is set in the last piece only."""

    index: int
    text: str
    tokens: list[TokenInfo]
    finish: Finish | None = None


@dataclass
class Choice:
    """The state of one choice between chunks."""

    index: int
    tokenizer: Tokenizer
    stops: list[str]
    min_tokens: int = 0  # stop strings are ignored before this many
    shows_end: bool = False  # the last piece has the token that ended the choice, with its logprobs
    keep_stop: bool = False  # the text that ends the answer is part of it
    show_special: bool = False  # special tokens are part of the text
    show_markers: bool = False  # of the special tokens, those that mark calls are
    completion_tokens: int = 0
    cached_tokens: int = 0
    finished: bool = False
    _decoded_chars: int = 0  # out of the detokenizer
    _sent_chars: int = 0  # out of the stop scanner
    _unsent: deque[TokenInfo] = field(default_factory=deque)  # tokens whose text is not sent yet

    def __post_init__(self) -> None:
        self._detokenizer = detokenizer(self.tokenizer, special=self.show_special, markers=self.show_markers)
        self._scanner = StopScanner(self.stops, kept=self.keep_stop)

    def feed(self, chunk: Chunk) -> Piece:
        """The piece that `chunk` adds. Tokens after a stop string are dropped and not counted."""
        self.cached_tokens = self.cached_tokens or chunk.cached_tokens
        text = ""
        for position, token in enumerate(chunk.tokens):
            if chunk.logprobs:
                self._unsent.append(TokenInfo(token, chunk.logprobs[position], self._decoded_chars))
            self.completion_tokens += 1
            text += self._scan(self._detokenizer.push(token))
            if self._scanner.found:
                return self._piece(text, "stop")
        if chunk.finish in {"stop", "length"}:
            if self.keep_stop and chunk.stop_token is not None:
                text += self._scan(self._detokenizer.push(chunk.stop_token))
            text += self._scan(self._detokenizer.flush())
            if self.shows_end and chunk.stop_token is not None and chunk.logprobs:
                self._unsent.append(TokenInfo(chunk.stop_token, chunk.logprobs[-1], self._decoded_chars))
            finish: Finish = "stop" if chunk.finish == "stop" or self._scanner.found else "length"
            return self._piece(text + self._scanner.flush(), finish)
        return self._piece(text, None)

    def _scan(self, text: str) -> str:
        self._decoded_chars += len(text)
        return text if self.completion_tokens < self.min_tokens else self._scanner.push(text)

    def _piece(self, text: str, finish: Finish | None) -> Piece:
        self._sent_chars += len(text)
        self.finished = finish is not None
        send_all = self.finished and not self._scanner.found  # also tokens without text
        tokens = []
        while self._unsent and (send_all or self._unsent[0].offset < self._sent_chars):
            tokens.append(self._unsent.popleft())
        return Piece(self.index, text, tokens, finish)
