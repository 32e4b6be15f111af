"""The loss of a batch: packed examples, what the model makes of their targets, and the loss over lm_head.

Logits of all targets at once would be the largest tensor of a training step, so `head_loss` computes losses
and their gradient with respect to the hidden states in chunks of CHUNK_TARGETS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from server.finetune.data.dataset import Example

NO_TARGET = -100  # the label of a position without a target
CHUNK_TARGETS = 128  # logits computed at once: some tens of MB with a vocabulary of 50,000


@dataclass(frozen=True)
class Batch:
    """Packed sequences, T tokens in all. `targets[i]` is the token that the model should predict after i."""

    ids: torch.Tensor  # int64 [T]
    lengths: list[int]  # of the sequences; their sum is T
    targets: torch.Tensor  # int64 [T]; NO_TARGET where nothing is learned
    weights: torch.Tensor  # float32 [T]: of the targets in the loss

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Batch":
        """Pack the examples in the given order."""
        targets: list[int] = []
        weights: list[float] = []
        for example in examples:
            following = list(zip(example.tokens[1:], example.weights[1:], strict=True))
            targets += [token if weight else NO_TARGET for token, weight in following] + [NO_TARGET]
            weights += [weight for _, weight in following] + [0.0]
        return cls(
            ids=torch.tensor([token for example in examples for token in example.tokens]),
            lengths=[len(example.tokens) for example in examples],
            targets=torch.tensor(targets),
            weights=torch.tensor(weights, dtype=torch.float32),
        )


@dataclass(frozen=True)
class BatchOutput:
    """Results for the n targets of a batch, in its order. The mean loss is loss_sum / weight_sum."""

    loss_sum: torch.Tensor  # float32 []: sum of weight * cross entropy in nats; has the gradient
    weight_sum: float
    losses: torch.Tensor  # float32 [n]: cross entropy
    hits: torch.Tensor  # bool [n]: the target was the most likely token
    sequences: torch.Tensor  # int64 [n]: index of each target's sequence

    @property
    def correct(self) -> int:
        return int(self.hits.sum())

    @property
    def count(self) -> int:
        return self.hits.shape[0]


def head_loss(
    hidden: torch.Tensor,  # [n, hidden]
    targets: torch.Tensor,  # int64 [n]
    weights: torch.Tensor,  # float32 [n]
    logits: Callable[[torch.Tensor], torch.Tensor],  # [k, hidden] -> [k, vocabulary]; frozen
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of weight * loss [], losses [n], hits [n]).

    The gradient with respect to `hidden` is computed along with the loss, so that the logits of one chunk are
    freed before those of the next are computed.
    """
    training = torch.is_grad_enabled() and hidden.requires_grad
    losses, hits, gradients = [], [], []
    chunks = (torch.split(x, CHUNK_TARGETS) for x in (hidden.detach(), targets, weights))
    for h, t, w in zip(*chunks, strict=True):
        with torch.set_grad_enabled(training):
            h.requires_grad_(training)
            scores = logits(h).float()
            loss = F.cross_entropy(scores, t, reduction="none")
            if training:
                gradients += torch.autograd.grad((loss * w).sum(), h)
        losses.append(loss.detach())
        hits.append(scores.detach().argmax(-1) == t)
    all_losses = torch.cat(losses) if losses else hidden.new_zeros(0)
    total = (all_losses * weights).sum()
    if training:
        total = _PrecomputedGradient.apply(hidden, torch.cat(gradients), total)  # type: ignore[no-untyped-call]
    return total, all_losses, torch.cat(hits) if hits else targets.new_zeros(0, dtype=torch.bool)


class _PrecomputedGradient(torch.autograd.Function):
    """A loss [] whose gradient with respect to hidden [n, hidden] is already computed."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, gradient: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - gets the gradient
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
