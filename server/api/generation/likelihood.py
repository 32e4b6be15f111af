"""Which of the choices of `best_of` are given: the likeliest, by the mean logprob of their tokens."""

from dataclasses import dataclass
from typing import Any

from server.api.generation.choice import Piece


@dataclass
class Likelihood:
    """Of one choice, while it comes."""

    _sum: float = 0.0
    _tokens: int = 0

    def add(self, piece: Piece) -> None:
        self._sum += sum(info.logprobs.logprob for info in piece.tokens)
        self._tokens += len(piece.tokens)

    @property
    def mean(self) -> float:
        return self._sum / self._tokens if self._tokens else 0.0


def likeliest(
    choices: list[dict[str, Any]], likelihoods: list[Likelihood], made: int, n: int
) -> list[dict[str, Any]]:
    """The `n` likeliest of the `made` choices of each prompt, the likeliest first, with new indices."""
    if made == n:
        return choices
    kept: list[dict[str, Any]] = []
    for first in range(0, len(choices), made):
        by_mean = sorted(range(first, first + made), key=lambda i: -likelihoods[i].mean)
        kept += [choices[i] for i in by_mean[:n]]
    return [choice | {"index": index} for index, choice in enumerate(kept)]
