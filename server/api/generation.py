"""A request under way: rows in, pieces of answer out, for completions and chat, streamed or not."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from server.api.choice import Choice, Piece
from server.api.services import Services
from server.api.target import Target
from server.engine.messages import Generate
from server.errors import EngineLost


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass
class Generation:
    """One request under way: a choice for each prompt and each of n, prompt by prompt."""

    parts: Services
    id: str
    target: Target
    prompts: list[list[int]]
    rows: list[Generate]
    choices: list[Choice]
    created: int = field(default_factory=lambda: int(time.time()))
    _arrived: float = field(default_factory=time.monotonic)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces as they come, until every choice has finished; closing it cancels the rest.

        Raises what ended the request early: EngineLost, DeadlineExceeded, NonFinite, ...
        """
        self.parts.admit(len(self.rows))
        choices = {row.id: choice for row, choice in zip(self.rows, self.choices, strict=True)}
        clock = _Clock(self.parts, self._arrived)
        engine = self.parts.engine
        async with aclosing(engine.generate(*self.rows)) as chunks:
            async for chunk in chunks:
                choice = choices[chunk.id]
                if choice.finished:
                    continue
                if chunk.finish == "cancelled":
                    raise EngineLost("The engine gave this request up; send it again.")
                clock.tick(choice.index, len(chunk.tokens))
                piece = choice.feed(chunk)
                if piece.finish is not None:
                    clock.finish(piece.finish)
                    if chunk.finish is None:  # a stop string: the engine does not know
                        engine.cancel(chunk.id)
                if piece.text or piece.tokens or piece.finish:
                    yield piece

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, self.prompts)),
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
            cached_tokens=sum(choice.cached_tokens for choice in self.choices[:: self.n]),
        )

    @property
    def n(self) -> int:
        """Choices for each prompt."""
        return len(self.choices) // len(self.prompts)


class _Clock:
    """Latencies of one request, into the metrics."""

    def __init__(self, parts: Services, arrived: float) -> None:
        self._metrics = parts.metrics
        self._arrived = arrived
        self._last: dict[int, float] = {}

    def tick(self, index: int, tokens: int) -> None:
        if not tokens:
            return
        now = time.monotonic()
        if index in self._last:
            self._metrics.between_tokens.observe((now - self._last[index]) / tokens)
        else:
            self._metrics.first_token.observe(now - self._arrived)
        self._last[index] = now

    def finish(self, reason: str) -> None:
        self._metrics.end_to_end.observe(time.monotonic() - self._arrived)
        self._metrics.finished.labels(reason).inc()
