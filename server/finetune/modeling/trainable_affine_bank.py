"""The affine bank as it trains: one adapter for all tokens, dropout, and no views of y."""

from typing import Any

import torch

from server.adapters.methods.affine_bank import AffineBank, apply
from server.adapters.methods.affine_layout import AffineDelta, deltas_of
from server.adapters.methods.interface import Packed
from server.adapters.methods.token_spans import TokenSpans
from server.adapters.sites import Base, Site

SLOT = 1
DROPOUT_LEVELS = 1 << 16  # dropout is one of so many shares


class TrainableAffineBank(AffineBank):
    """Dropout acts on what LoRA's A sees. Sites that see the same x see it with the same gaps: drawing them
    is the most of its cost, and q, k and v need no more memory than one.
    """

    dropout = 0.0
    seed = 0  # of a batch's gaps; the same seed gives the same ones, also when a layer is computed again

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(base, slots, device, dtype)
        self.trained: dict[str, AffineDelta] = {}  # by site
        self._numbers = {name: i for i, name in enumerate(base.sites)}
        self._whole: torch.Tensor | None = None  # the last x, kept so that nothing else takes its place
        self._gapped = torch.empty(0)

    def put(self, slot: int, packed: Packed) -> None:
        """Views that gradients flow through; no kernel reads a table here."""
        assert slot == SLOT
        self.trained = deltas_of(packed.flat.to(self.device), packed.layout)

    def clear(self, slot: int) -> None:
        assert slot == SLOT
        self.trained = {}
        self._whole, self._gapped = None, torch.empty(0)

    def affine(
        self,
        site: Site,
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,  # noqa: ARG002 - every token is slot 1's
        bias: torch.Tensor | None,
    ) -> None:
        change = self.trained.get(site.name)
        if change is None:
            return
        if self.dropout and change.a is not None:
            x = self._with_gaps(site, x)
        apply(change, site, x, y, bias)

    def _with_gaps(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        if self._whole is None or not _is_same(x, self._whole):
            self._whole = x
            self._gapped = drop(x, self.dropout, self.seed + self._numbers[site.name])
        return self._gapped


def _is_same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether both are views of the same values."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x._version == y._version  # noqa: SLF001 - has no public name


def drop(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """x with this share of its elements zero and the others scaled up.

    torch's own dropout draws its numbers one by one, each from 64 bits, which was a quarter of a step.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    levels = bits.view(torch.int16)[: x.numel()].view(x.shape)
    apply: Any = _Drop.apply  # torch has no types for it
    dropped: torch.Tensor = apply(x, levels, round(share * DROPOUT_LEVELS))
    return dropped


class _Drop(torch.autograd.Function):
    """Of 2^16 levels, an element with one of the lowest `gaps` is dropped. Keeps two bytes an element."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, levels: torch.Tensor, gaps: int) -> torch.Tensor:
        ctx.save_for_backward(levels)
        ctx.gaps = gaps
        return x * _factors(x, levels, gaps)

    @staticmethod
    def backward(ctx: Any, upon: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (levels,) = ctx.saved_tensors
        return upon * _factors(upon, levels, ctx.gaps), None, None


def _factors(x: torch.Tensor, levels: torch.Tensor, gaps: int) -> torch.Tensor:
    factors = torch.empty_like(x)
    torch.ge(levels, torch.iinfo(torch.int16).min + gaps, out=factors)
    return factors.mul_(DROPOUT_LEVELS / (DROPOUT_LEVELS - gaps))
