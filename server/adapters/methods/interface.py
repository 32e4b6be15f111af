"""The interface of a PEFT method: how its spec is read, packed for a device, and applied in the forward pass.

A method knows nothing of the engine, of tenants, or of HTTP. A new one is a file in `specs/`, which reads
uploads without torch, a file here, and a line in the table of each folder's `__init__.py`.
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
    """Keys and values of a row's virtual tokens, as they go into the cache: no rotary embedding, no norm."""

    keys: torch.Tensor  # [layers, virtual, kv_heads, head_dim]
    values: torch.Tensor


class RecordedSites(NamedTuple):
    """What a slot asks of a recorded step: bits of the sites it touches, its highest rank or width.

    `biased`: sites at which it asks for nothing but what `Bank.biases` gives; these are not in the mask.
    """

    mask: int = 0
    ranks: int = 0
    biased: int = 0


# x [n, hidden] -> (fixed, scaled): with any weight w and bias b, the norm of x is fixed + scaled * w + b
NormParts = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Bank:
    """Device memory for the adapters of one method, or of several that act alike, addressed by slot.

    `put` and `clear` are called between steps, the hooks within one; they do nothing by default. A bank is
    asked only about rows of its own methods, and only through the hooks that it overrides.
    """

    leads = False  # it acts on virtual tokens alone: rows that are past them need not ask it
    most = MAX_DECODE_SPAN  # tokens of a span that its kernels take, as Rows has it

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        """Empty, for slots 1..slots."""

    def put(self, slot: int, packed: Packed) -> None:
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        raise NotImplementedError

    def affine(
        self, site: Site, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans, bias: torch.Tensor | None
    ) -> None:
        """Change y [T, out] = W x + b in place by what each token's adapter adds, inside a linear,
        an embedding (x is token ids [T], negative for virtual tokens) or a norm. `bias` is the base's b.
        """

    def joint(
        self,
        sites: Sequence[Site],
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,
        bias: torch.Tensor | None,
    ) -> None:
        """As `affine`, for several sites that see the same x; their columns stand side by side in y and b.

        A bank may do here what it would do at each, and name them in `rows.settled`; `affine` comes all the
        same. By default it does nothing.
        """

    def biases(
        self,
        sites: Sequence[Site],  # noqa: ARG002 - a hook's default
        columns: Sequence[slice],  # noqa: ARG002
        rows: TokenSpans,  # noqa: ARG002
        count: int,  # noqa: ARG002
    ) -> Biases | None:
        """What a kernel that computes these sites' outputs, in these columns, for `count` tokens may add as
        it writes them: the biases of adapters that change them by nothing else. `affine` and `joint` come
        all the same and leave out what was given here.
        """
        return None

    def inputs(self, site: Site, x: torch.Tensor, rows: TokenSpans) -> torch.Tensor:  # noqa: ARG002 - a hook's default
        """What a linear sees in the place of x [T, in], which stays as it is."""
        return x

    def norm(self, site: Site, parts: NormParts, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans) -> None:
        """Change y [T, hidden], a norm of x, in place."""

    def sublayer(self, site: Site, h: torch.Tensor, r: torch.Tensor, rows: TokenSpans) -> None:
        """Change h [T, hidden], the output of an attention or MLP block, in place; r [T, hidden] is the
        residual stream before that block's norm.
        """

    def start(self, slot: int) -> Start | None:  # noqa: ARG002 - a hook's default
        """The K/V of an adapter's virtual tokens; asked when a row begins and finds them nowhere cached."""
        return None

    def trace(self, slot: int) -> RecordedSites | None:  # noqa: ARG002 - as above
        """What a decode step that is recorded once and replayed must hold for this slot's rows; None if
        this slot's rows cannot be in one.
        """
        return None

    def touched(self, trace: RecordedSites) -> dict[str, int]:  # noqa: ARG002 - as above
        """`Rows.touched` for the sites of a trace."""
        return {}

    def acts(self, hook: str, slots: Iterable[int]) -> bool:  # noqa: ARG002 - a bank may tell them apart
        """Whether this bank may act through `hook` on rows of these slots: by default, if it overrides it."""
        return getattr(type(self), hook) is not getattr(Bank, hook)


class Method(SpecReader, Protocol):
    """Stateless. `spec` is always what this method's own `parse` returned."""

    @property
    def bank(self) -> type[Bank]:
        """Methods that name the same class share one bank, and one launch a site."""

    def init(
        self, spec: Any, base: Base, weights: Mapping[str, torch.Tensor], rng: torch.Generator
    ) -> Tensors:
        """Where training starts; `weights` as in `pack`. New tensors, float32."""

    def pack(
        self, spec: Any, base: Base, tensors: Tensors, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> Packed:
        """Fold scalings and norms in, once, off the hot path.

        `weights` are the base's own, by site name, read-only; a bias is at "SITE.bias". Raises InvalidAdapter
        if the result overflows.
        """
