"""Prompt logprobs as the engine's chunks carry them, in Python's own numbers."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.engine import Engine
from server.messages import Chunk, Generate
from tests.fixtures.engine import Driver


@dataclass
class Scores:
    """Of one row, for each prompt token after the first: logprob, rank, and (id, logprob) of the best."""

    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    largest: int = 0  # tokens of one chunk

    def add(self, chunk: Chunk) -> None:
        if (part := chunk.prompt_logprobs) is None:
            return
        logprobs, best = array("f", part.logprobs), array("f", part.top_logprobs)
        k = len(best) // len(logprobs)
        pairs = list(zip(array("i", part.top_ids), best, strict=True))
        self.logprobs += logprobs
        self.ranks += array("i", part.ranks)
        self.tops += [pairs[i * k : (i + 1) * k] for i in range(len(logprobs))]
        self.largest = max(self.largest, len(logprobs))


class ScoringDriver(Driver):
    """Keeps the prompt logprobs of each row."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.scores: dict[str, Scores] = {}

    def receive(self, chunk: Chunk) -> None:
        self.scores.setdefault(chunk.id, Scores()).add(chunk)
        super().receive(chunk)


def score(engine: Engine, commands: Sequence[Generate]) -> list[Scores]:
    """The prompt logprobs of these rows, which run at once."""
    driver = ScoringDriver(engine)
    for command in commands:
        driver.submit(command)
    driver.finish()
    for command in commands:
        assert driver.rows[command.id].error is None
    return [driver.scores[command.id] for command in commands]
