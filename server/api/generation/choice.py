"""One choice of an answer: the engine's tokens become text, cut at stop strings, with their logprobs.

Knows no HTTP and no JSON. Streamed or not, the same pieces come out, so their texts joined are the text.
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
    """A generated token as logprobs show it."""

    token: int
    logprobs: TokenLogprobs
    offset: int  # characters of the choice's text before it


@dataclass(frozen=True)
class Piece:
    """What a choice gained. `finish` is set in its last piece only."""

    index: int
    text: str
    tokens: list[TokenInfo]
    finish: Finish | None = None


@dataclass
class Choice:
    index: int
    tokenizer: Tokenizer
    stops: list[str]
    min_tokens: int = 0  # no stop string counts before this many
    completion_tokens: int = 0
    cached_tokens: int = 0
    finished: bool = False
    _decoded: int = 0  # characters out of the detokenizer
    _sent: int = 0  # characters out of the stop scanner
    _held: deque[TokenInfo] = field(default_factory=deque)  # tokens whose text is not out yet

    def __post_init__(self) -> None:
        self._detokenizer = detokenizer(self.tokenizer)
        self._scanner = StopScanner(self.stops)

    def feed(self, chunk: Chunk) -> Piece:
        """The piece that `chunk` makes; what follows a stop string is dropped and not counted."""
        self.cached_tokens = self.cached_tokens or chunk.cached_tokens
        text = ""
        for position, token in enumerate(chunk.tokens):
            if chunk.logprobs:
                self._held.append(TokenInfo(token, chunk.logprobs[position], self._decoded))
            self.completion_tokens += 1
            text += self._scan(self._detokenizer.push(token))
            if self._scanner.found:
                return self._piece(text, "stop")
        if chunk.finish in {"stop", "length"}:
            text += self._scan(self._detokenizer.flush())
            finish: Finish = "stop" if chunk.finish == "stop" or self._scanner.found else "length"
            return self._piece(text + self._scanner.flush(), finish)
        return self._piece(text, None)

    def _scan(self, text: str) -> str:
        self._decoded += len(text)
        return text if self.completion_tokens < self.min_tokens else self._scanner.push(text)

    def _piece(self, text: str, finish: Finish | None) -> Piece:
        self._sent += len(text)
        self.finished = finish is not None
        whole = self.finished and not self._scanner.found  # then even a token without text is part of it
        tokens = []
        while self._held and (whole or self._held[0].offset < self._sent):
            tokens.append(self._held.popleft())
        return Piece(self.index, text, tokens, finish)
