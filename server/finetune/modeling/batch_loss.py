"""A batch of examples without padding, and what the model says of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.finetune.data.dataset import Example

NONE = -100  # no target


@dataclass(frozen=True)
class Batch:
    """Sequences one behind the other, T tokens in all. `targets` are what is to follow each token."""

    ids: torch.Tensor  # int64 [T]
    lengths: list[int]  # of the sequences; they add up to T
    targets: torch.Tensor  # int64 [T]; NONE where nothing is to be learned
    weights: torch.Tensor  # float32 [T], of the targets

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Batch":
        targets: list[int] = []
        weights: list[float] = []
        for example in examples:
            after = list(zip(example.tokens[1:], example.weights[1:], strict=True))
            targets += [token if weight else NONE for token, weight in after] + [NONE]
            weights += [weight for _, weight in after] + [0.0]
        return cls(
            ids=torch.tensor([token for example in examples for token in example.tokens]),
            lengths=[len(example.tokens) for example in examples],
            targets=torch.tensor(targets),
            weights=torch.tensor(weights, dtype=torch.float32),
        )


@dataclass(frozen=True)
class Output:
    """Over all n targets of a batch, in its order. The mean loss is loss_sum / weight_sum."""

    loss_sum: torch.Tensor  # of weight * cross entropy in nats; float32, the one with a gradient
    weight_sum: float
    losses: torch.Tensor  # float32 [n]: cross entropy
    hits: torch.Tensor  # bool [n]: the target was the likeliest
    sequences: torch.Tensor  # int64 [n]: which sequence each target is of

    @property
    def correct(self) -> int:
        return int(self.hits.sum())

    @property
    def count(self) -> int:
        return self.hits.shape[0]
