"""The affine bank as it trains: one adapter for all tokens, dropout, and no views of y."""

import torch
import torch.nn.functional as F

from server.adapters.methods.affine import AffineBank, apply
from server.adapters.methods.base import Rows
from server.adapters.sites import Site

SLOT = 1


class TrainedAffine(AffineBank):
    dropout = 0.0  # of what LoRA's A sees

    def affine(
        self,
        site: Site,
        x: torch.Tensor,
        y: torch.Tensor,
        rows: Rows,  # noqa: ARG002 - every token is slot 1's
        bias: torch.Tensor | None,
    ) -> None:
        change = self.changes[SLOT].get(site.name)
        if change is None:
            return
        if self.dropout and change.a is not None:
            x = F.dropout(x, self.dropout)
        apply(change, site, x, y, bias)
