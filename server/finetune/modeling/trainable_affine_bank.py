"""The affine bank in training: one adapter for all tokens, with gradients and dropout."""

from typing import Any

import torch

from server.adapters.methods.affine_bank import AffineBank, apply
from server.adapters.methods.affine_layout import AffineDelta, deltas_of
from server.adapters.methods.interface import Packed
from server.adapters.methods.token_spans import TokenSpans
from server.adapters.sites import Base, Site

SLOT = 1
DROPOUT_LEVELS = 1 << 16  # the resolution of the dropout rate


class TrainableAffineBank(AffineBank):
    """Dropout acts on the input of LoRA's A. Sites with the same input x share one mask: drawing it is most
    of the cost of dropout, and q, k and v need the memory of one.
    """

    dropout = 0.0
    seed = 0  # of the batch's masks; a layer that is recomputed draws the same mask

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(base, slots, device, dtype)
        self.deltas: dict[str, AffineDelta] = {}  # by site
        self._numbers = {name: i for i, name in enumerate(base.sites)}
        self._last_input: torch.Tensor | None = None  # kept alive, so that no other tensor gets its address
        self._last_dropped = torch.empty(0)

    def put(self, slot: int, packed: Packed) -> None:
        """Take views of the packed tensor, through which gradients flow; there is no kernel table."""
        assert slot == SLOT
        self.deltas = deltas_of(packed.flat.to(self.device), packed.layout)

    def clear(self, slot: int) -> None:
        assert slot == SLOT
        self.deltas = {}
        self._last_input, self._last_dropped = None, torch.empty(0)

    def affine(
        self,
        site: Site,
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,  # noqa: ARG002 - every token is slot 1's
        bias: torch.Tensor | None,
    ) -> None:
        """Add the adapter's delta for x [T, in] to y [T, out], with dropout on the input of A."""
        delta = self.deltas.get(site.name)
        if delta is None:
            return
        if self.dropout and delta.a is not None:
            x = self._with_dropout(site, x)
        apply(delta, site, x, y, bias)

    def _with_dropout(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        if self._last_input is None or not _is_same(x, self._last_input):
            self._last_input = x
            self._last_dropped = with_dropout(x, self.dropout, self.seed + self._numbers[site.name])
        return self._last_dropped


def _is_same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x and y are views of the same, unmodified memory."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x._version == y._version  # noqa: SLF001 - has no public name


def with_dropout(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """x, of any shape, with this share of its elements zeroed and the others scaled up.

    torch's dropout draws 64 random bits for each element, which took a quarter of a step; this draws 16.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    bits.random_(torch.iinfo(torch.int64).min, None, generator=generator)
    levels = bits.view(torch.int16)[: x.numel()].view(x.shape)
    apply: Any = _Dropout.apply  # torch has no types for it
    dropped: torch.Tensor = apply(x, levels, round(share * DROPOUT_LEVELS))
    return dropped


class _Dropout(torch.autograd.Function):
    """Drops the elements whose level, one of 2^16, is among the lowest `dropped`.

    Backward needs two bytes for each element.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, levels: torch.Tensor, dropped: int) -> torch.Tensor:
        ctx.save_for_backward(levels)
        ctx.dropped = dropped
        return x * _factors(x, levels, dropped)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (levels,) = ctx.saved_tensors
        return grad * _factors(grad, levels, ctx.dropped), None, None


def _factors(x: torch.Tensor, levels: torch.Tensor, dropped: int) -> torch.Tensor:
    factors = torch.empty_like(x)
    torch.ge(levels, torch.iinfo(torch.int16).min + dropped, out=factors)
    return factors.mul_(DROPOUT_LEVELS / (DROPOUT_LEVELS - dropped))
