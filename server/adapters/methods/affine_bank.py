"""Everything that is affine at a site, on the device: LoRA, biases, scaled outputs. One bank serves them all.

    y  ->  y + gain * (y - b) + B A x + bias        with y = W x + b, the base's own output

An adapter may also bring a norm's own parameters. Such a norm is computed anew from its input: what it gave
cannot be rescaled, since where the base's weight is zero nothing is left to scale.

Each adapter is one flat buffer, and a table per site says where its pieces lie: an adapter occupies exactly
its own bytes, whatever its rank and targets, and a slot is a row of a table. At a norm there is no A and B.
"""

import sys
from collections.abc import Iterable, Sequence

import torch

from server.adapters.methods.affine_layout import AffineDelta, LoadedSlot, SlotLayouts, TensorPiece
from server.adapters.methods.flat_buffer import flatten_noting
from server.adapters.methods.interface import Bank, NormParts, Packed, RecordedSites
from server.adapters.methods.token_spans import BIAS, MATRICES, SCALE, TokenSpans
from server.adapters.sites import Base, Site
from server.kernels import token_blocks as gpu
from server.kernels.cpu import grouped_affine as kernel
from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.limits import MAX_RANK
from server.kernels.site_table import SiteTable

MAX_UNIONS = 256


def pack_deltas(changes: Iterable[AffineDelta], dtype: torch.dtype) -> Packed:
    """One host buffer. Raises InvalidAdapter if a folded value overflows `dtype`."""
    pieces: list[TensorPiece] = []
    parts: list[torch.Tensor] = []
    factors: list[float] = []
    for change in changes:
        for part in ("a", "b", "gain", "bias", "scale", "norm"):
            tensor: torch.Tensor | None = getattr(change, part)
            if tensor is not None:
                pieces.append(TensorPiece(change.site, part, tuple(tensor.shape)))
                parts.append(tensor)
                factors.append(change.factor if part == "b" else 1.0)
    scaled = any(piece.part in ("gain", "scale", "norm") for piece in pieces)
    flat, copies = flatten_noting(parts, dtype, factors)
    return Packed(flat, pieces, summable=not scaled, copies=copies)


class AffineBank(Bank):
    """Slots for adapters that change sites affinely."""

    most = sys.maxsize  # its kernels take prefill, too

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.sites = base.sites
        self.held: list[LoadedSlot | None] = [None] * (slots + 1)
        names = [name for name, site in base.sites.items() if site.kind in ("linear", "embedding", "norm")]
        self.table = SiteTable(names, slots, kernel.COLUMNS, device)
        self.gpu = gpu.uses_triton(device)
        self.fast = AVAILABLE and not self.gpu and device.type == "cpu" and dtype == torch.float32
        self._with_norms: set[int] = set()  # slots whose adapters bring norms
        self._unions: dict[frozenset[int], dict[str, int]] = {}  # sites touched by sets of slots
        self._anatomies = SlotLayouts(self.table)

    def put(self, slot: int, packed: Packed) -> None:
        """Fill a free slot. On a CPU this copies nothing: the host buffer is the device's."""
        flat = packed.flat.to(self.device, non_blocking=True)
        anatomy = self._anatomies.of(packed.layout, flat.itemsize)
        held = self.held[slot] = LoadedSlot(flat, anatomy, aligned=self.gpu)
        if anatomy.norms:
            self._with_norms.add(slot)
        if self.fast:
            self.table.fill(slot, anatomy.rows(flat.data_ptr()), anatomy.mask, anatomy.rank)
        else:
            entries = {name: table_row(held.changes[name]) for name in anatomy.ways}
            self.table.put(slot, entries, anatomy.rank)
        self._unions.clear()

    def clear(self, slot: int) -> None:
        self.table.clear(slot)
        self.held[slot] = None
        self._with_norms.discard(slot)
        self._unions.clear()

    def change(self, slot: int, site: str) -> AffineDelta | None:
        """What this slot's adapter does there, if anything."""
        held = self.held[slot]
        return held.changes.get(site) if held and site in held.anatomy.ways else None

    def biases(
        self, sites: Sequence[Site], columns: Sequence[slice], rows: TokenSpans, count: int
    ) -> Biases | None:
        """Those of `rows.few`, where our kernels run."""
        if not self.fast or not self._side_by_side(sites) or not self._ways(sites, rows) & BIAS:
            return None
        rows.check(count)
        rows.biased.update(site.name for site in sites)
        first = self.table.numbers[sites[0].name]
        return Biases(rows.by_token(count), self.table.rows, first, columns)

    def affine(
        self, site: Site, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans, bias: torch.Tensor | None
    ) -> None:
        if site.name in rows.settled:
            rows.settled.discard(site.name)
        elif site.name not in self._touched(rows):
            return
        elif self._takes(site):
            self._launch([site], x, y, rows, bias)
        rows.check(len(x))
        for slot, start, end, weight in rows.many if self._takes(site) else rows.spans:
            if change := self.change(slot, site.name):
                apply(change, site, x[start:end], y[start:end], bias, weight)

    def joint(
        self,
        sites: Sequence[Site],
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,
        bias: torch.Tensor | None,
    ) -> None:
        """One launch for them all, where a kernel takes them and they stand side by side in its table."""
        if not self._takes(sites[0]) or not self._side_by_side(sites):
            return
        if self._ways(sites, rows):
            self._launch(sites, x, y, rows, bias)
        rows.settled.update(site.name for site in sites)

    def norm(self, site: Site, parts: NormParts, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans) -> None:
        found = rows.spread(lambda slot: self._norm(slot, site.name))
        if found is None:
            return
        rows.check(len(x))
        tokens, own = found
        fixed, scaled = parts(x[tokens])
        y[tokens] = fixed + scaled * own[:, 0] + (own[:, 1] if site.bias else 0)

    def acts(self, hook: str, slots: Iterable[int]) -> bool:
        """Norms are asked of adapters that bring some; the others' steps are not slower for those."""
        if hook != "norm":
            return super().acts(hook, slots)
        return bool(self._with_norms) and not self._with_norms.isdisjoint(slots)

    def trace(self, slot: int) -> RecordedSites | None:
        """Norms are computed from the host's lists: no step with one is recorded."""
        if slot in self._with_norms:
            return None
        mask, ranks = self.table.masks[slot], self.table.ranks[slot]
        if self.fast:
            held = self.held[slot]
            biased = held.anatomy.biased if held else 0
            return RecordedSites(mask & ~biased, ranks, biased)
        return RecordedSites(mask, ranks) if self.gpu else None

    def touched(self, trace: RecordedSites) -> dict[str, int]:
        found = dict.fromkeys(self.table.among(trace.biased), BIAS)
        for name in self.table.among(trace.mask):
            way = SCALE if self.sites[name].kind == "norm" else MATRICES
            found[name] = way | found.get(name, 0)
        return found

    def _norm(self, slot: int, site: str) -> torch.Tensor | None:
        held = self.held[slot]
        return held.changes[site].norm if held and site in held.anatomy.norms else None

    def _side_by_side(self, sites: Sequence[Site]) -> bool:
        """Whether they are so in the table."""
        numbers = [self.table.numbers[site.name] for site in sites]
        return numbers == list(range(numbers[0], numbers[0] + len(sites)))

    def _takes(self, site: Site) -> bool:
        """Whether a kernel does what `rows.few` ask of it."""
        return self.gpu or (self.fast and site.kind != "embedding")

    def _launch(
        self,
        sites: Sequence[Site],
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,
        bias: torch.Tensor | None,
    ) -> None:
        rows.check(len(x))
        ways, first = self._ways(sites, rows), self.table.numbers[sites[0].name]
        heavy, widths = bool(ways & MATRICES), [site.outputs for site in sites]
        if not self.gpu:
            given = sites[0].name in rows.biased
            rows.biased.difference_update(site.name for site in sites)
            if len(rows.tokens) and not (given and ways == BIAS):
                own = (rows.tokens, rows.slots, self.table.rows)
                kernel.grouped_affine(
                    x, y, *own, first, widths, bias, has_matrices=heavy, add_bias_only=not given
                )
            return
        from server.kernels.gpu.grouped_affine import grouped_affine  # Triton is not everywhere

        plan = rows.plan(self.device, self.table.ranks.__getitem__)
        grouped_affine(x, y, plan, self.table.rows, first, widths, bias, has_matrices=heavy)

    def _ways(self, sites: Sequence[Site], rows: TokenSpans) -> int:
        """How these rows' adapters change any of these sites."""
        touched, ways = self._touched(rows), 0
        for site in sites:
            ways |= touched.get(site.name, 0)
        return ways

    def _touched(self, rows: TokenSpans) -> dict[str, int]:
        if rows.touched is None:
            slots = frozenset(span.slot for span in rows.spans)
            if slots not in self._unions:
                if len(self._unions) >= MAX_UNIONS:
                    self._unions.clear()
                union: dict[str, int] = {}
                for held in (self.held[slot] for slot in slots):
                    for name, way in held.anatomy.ways.items() if held else ():
                        union[name] = way | union.get(name, 0)
                self._unions[slots] = union
            rows.touched = self._unions[slots]
        return rows.touched


def table_row(change: AffineDelta) -> list[int]:
    """What a kernel reads of a change: COLUMNS numbers."""
    parts = (change.a, change.b, change.gain, change.bias)
    rank = 0 if change.b is None else change.b.shape[0]
    assert rank <= MAX_RANK, f"rank {rank} is over the kernel's scratch"
    item = 0 if change.b is None else change.b.itemsize
    return [*(0 if t is None else t.data_ptr() for t in parts), rank, item]


def apply(
    change: AffineDelta,
    site: Site,
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    weight: float = 1.0,
) -> None:
    """One adapter's tokens, in place; the plain twin of the kernel, which knows neither weights nor tables.

    `weight` scales what is added; an adapter with a gain is never weighted.
    """
    if change.gain is not None:
        own = y.clone() if bias is None else y - bias  # a copy: autograd keeps it while y changes
        y.addcmul_(change.gain, own)
    if change.a is not None and change.b is not None:
        if site.kind == "embedding":
            real = x >= 0  # virtual tokens have no row in a table
            y[real] += weight * (change.a[x[real]] @ change.b)
        else:
            a, b = (matrix.to(x.dtype) for matrix in (change.a, change.b))
            y.addmm_(x @ a.T, b, alpha=weight)
    if change.bias is not None:
        y.add_(change.bias, alpha=weight)
