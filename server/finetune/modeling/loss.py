"""Cross entropy without the logits of all tokens at once: [T, vocabulary] would dwarf all else in memory."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

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
