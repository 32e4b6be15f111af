"""A batch of examples without padding, and what the model says of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

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


ROWS = 128  # targets at a time: some tens of MB with a vocabulary of 50,000


def head_loss(
    hidden: torch.Tensor,  # [n, hidden]
    targets: torch.Tensor,  # int64 [n]
    weights: torch.Tensor,  # float32 [n]
    logits: Callable[[torch.Tensor], torch.Tensor],  # [rows, hidden] -> [rows, vocabulary]; trains nothing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of weight * loss, losses [n], hits [n]).

    The gradient upon `hidden` is computed along with the loss, so that each chunk's logits are gone before
    the next one's are made.
    """
    training = torch.is_grad_enabled() and hidden.requires_grad
    losses, hits, gradients = [], [], []
    for h, t, w in zip(hidden.detach().split(ROWS), targets.split(ROWS), weights.split(ROWS), strict=True):  # type: ignore[no-untyped-call]
        with torch.set_grad_enabled(training):
            h.requires_grad_(training)
            scores = logits(h).float()
            loss = F.cross_entropy(scores, t, reduction="none")
            if training:
                gradients += torch.autograd.grad((loss * w).sum(), h)
        losses.append(loss.detach())
        hits.append(scores.detach().argmax(-1) == t)
    every = torch.cat(losses) if losses else hidden.new_zeros(0)
    total = (every * weights).sum()
    if training:
        total = _Known.apply(hidden, torch.cat(gradients), total)  # type: ignore[no-untyped-call]
    return total, every, torch.cat(hits) if hits else targets.new_zeros(0, dtype=torch.bool)


class _Known(torch.autograd.Function):
    """A loss whose gradient is there already."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - what the gradient is upon
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, upon: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upon, None, None
