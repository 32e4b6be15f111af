"""The interface of a PEFT method: how its spec is read, packed for a device, and applied in the forward pass.

A method knows nothing of the engine, of tenants, or of HTTP. specs/__init__.py lists what a further one
consists of. A further place of the forward pass where methods may act is a hook: a method of Bank with its
name in HOOKS, called for the banks of ForwardContext by the module that it acts at (engine/model/).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from server.adapters.checksum import checksum
from server.adapters.methods.token_spans import MAX_DECODE_SPAN, TokenSpans
from server.adapters.sites import Base, Site
from server.adapters.specs.interface import SpecReader
from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.pack_tensors import Copies

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """An adapter ready for a device: one flat host buffer, whose bytes all tiers count, and its layout."""

    flat: torch.Tensor  # [n], the engine's dtype; page-locked when the device is CUDA
    layout: Any  # the method's own: which pieces the buffer holds, and their shapes
    virtual_tokens: int = 0  # before each row, at positions 0, 1, ...; their ids are -1, -2, ...
    kv_precomputed: bool = False  # Bank.start gives their keys and values; else the model computes them
    summable: bool = False  # a weighted sum of several such adapters has a meaning
    checksum: int | None = None  # of `flat` as it was packed; set by the loader
    copies: Copies | None = None  # from the file's tensors to `flat`, if packing was nothing but copies

    def intact(self) -> bool:
        """Whether `flat` still holds what was packed. Waits for the device, if that is where it lies."""
        return self.checksum is None or checksum(self.flat) == self.checksum

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


@dataclass(frozen=True)
class Start:
    """Keys and values of a row's virtual tokens, as the KV cache stores them: not rotated, not normed."""

    keys: torch.Tensor  # [layers, virtual tokens, kv_heads, head_dim]
    values: torch.Tensor  # of the same shape


class RecordedSites(NamedTuple):
    """The sites that a recorded step must cover for a slot's rows, as bits of the bank's table."""

    mask: int = 0  # sites whose kernels must be launched
    ranks: int = 0  # the slot's highest rank or width
    biased: int = 0  # sites where `Bank.biases` gives all that the slot adds; not in `mask`


# x [n, hidden] -> (fixed, scaled): for any weight w and bias b, the norm of x is fixed + scaled * w + b
NormParts = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

# The hooks: methods of Bank through which banks act at a step's tokens; then those that also see, by
# themselves, the tokens that get logits.
HOOKS = ("affine", "inputs", "norm", "sublayer")
HEAD_HOOKS = ("affine", "inputs", "norm")


class Bank:
    """Device memory for the adapters of one method, or of several that act alike, by slot.

    `put` and `clear` are called between steps, the hooks during one. Hooks do nothing by default; a bank gets
    only the rows of its own methods, and only through the hooks that it overrides.
    """

    virtual_tokens_only = False  # if so, it is not called for rows whose virtual tokens are computed
    max_span = MAX_DECODE_SPAN  # tokens; see TokenSpans

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make empty slots 1 to `slots`."""

    def put(self, slot: int, packed: Packed) -> None:
        """Fill an empty slot with an adapter whose buffer lies on the device."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        raise NotImplementedError

    def affine(
        self, site: Site, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans, bias: torch.Tensor | None
    ) -> None:
        """Add the change of each token's adapter to y [T, out] = W x + b, in place.

        Called at linears (x [T, in]), embeddings (x [T] token ids, negative for virtual tokens) and norms.
        `bias` [out] is the base's b.
        """

    def joint(
        self,
        sites: Sequence[Site],
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,
        bias: torch.Tensor | None,
    ) -> None:
        """As `affine`, for several sites with the same x, whose outputs are adjacent columns of y and `bias`.

        A bank may apply all of them here and add their names to `rows.applied`. `affine` is called for each
        of them in any case.
        """

    def biases(
        self,
        sites: Sequence[Site],  # noqa: ARG002 - a hook's default
        columns: Sequence[slice],  # noqa: ARG002
        rows: TokenSpans,  # noqa: ARG002
        count: int,  # noqa: ARG002
    ) -> Biases | None:
        """Biases that the base's own kernel adds while it writes these sites' outputs, in these `columns`.

        They are those of adapters that change the sites by a bias alone, for `count` tokens. `affine` and
        `joint` are called in any case, and leave these out.
        """
        return None

    def inputs(self, site: Site, x: torch.Tensor, rows: TokenSpans) -> torch.Tensor:  # noqa: ARG002 - a hook's default
        """The inputs [T, in] that a linear gets in place of x [T, in], which is not changed."""
        return x

    def norm(self, site: Site, parts: NormParts, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans) -> None:
        """Change y [T, hidden], the norm of x [T, hidden], in place."""

    def sublayer(self, site: Site, h: torch.Tensor, r: torch.Tensor, rows: TokenSpans) -> None:
        """Change h [T, hidden], the output of an attention or MLP block, in place.

        r [T, hidden] is the residual stream before that block's norm.
        """

    def start(self, slot: int) -> Start | None:  # noqa: ARG002 - a hook's default
        """K/V of an adapter's virtual tokens; called when a row starts without them in the KV cache."""
        return None

    def recorded_sites(self, slot: int) -> RecordedSites | None:  # noqa: ARG002 - as above
        """What a decode step that is recorded once and replayed must cover for rows of this slot.

        None if such a step cannot compute them.
        """
        return None

    def touched(self, recorded: RecordedSites) -> dict[str, int]:  # noqa: ARG002 - as above
        """`TokenSpans.touched` of a recorded step."""
        return {}

    def acts(self, hook: str, slots: Iterable[int]) -> bool:  # noqa: ARG002 - a bank may tell them apart
        """Whether `hook` may change rows of these slots; by default, whether this bank overrides it."""
        return getattr(type(self), hook) is not getattr(Bank, hook)


class Method(SpecReader, Protocol):
    """One PEFT method: reads specs, makes initial tensors, packs adapters. Stateless.

    `spec` is always what this method's own `parse` returned; `weights` are the base's own, read-only, by site
    name, and its biases by "SITE.bias".
    """

    @property
    def bank(self) -> type[Bank]:
        """Methods of the same class of bank share one bank, and one kernel launch for each site."""

    def init(
        self, spec: Any, base: Base, weights: Mapping[str, torch.Tensor], rng: torch.Generator
    ) -> Tensors:
        """The tensors with which training starts, new ones in float32, with the shapes of `shapes`."""

    def pack(
        self, spec: Any, base: Base, tensors: Tensors, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> Packed:
        """Fold scalings and norms into the tensors, and put them into one flat buffer of `dtype`.

        Done once for each load, off the hot path. Raises InvalidAdapter if the result overflows.
        """
