"""The bank of all methods that are affine at a site: LoRA, biases, scaled outputs.

    y  ->  y + gain * (y - b) + B A x + bias        with y = W x + b, the base's own output

An adapter may also replace a norm's parameters. The norm is then computed again from its input: its output
cannot be rescaled, since it is zero where the base's weight is.

Each adapter is one flat buffer, and a table of addresses has a row for each slot and site. So an adapter
takes exactly its own bytes, whatever its rank and targets. At a norm there is no A and B.
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

MAX_TOUCHED_SETS = 256  # sets of slots whose touched sites are remembered


def pack_deltas(deltas: Iterable[AffineDelta], dtype: torch.dtype) -> Packed:
    """Pack deltas into one host buffer. Raises InvalidAdapter if a scaled value overflows `dtype`."""
    pieces: list[TensorPiece] = []
    parts: list[torch.Tensor] = []
    factors: list[float] = []
    for delta in deltas:
        for part in ("a", "b", "gain", "bias", "scale", "norm"):
            tensor: torch.Tensor | None = getattr(delta, part)
            if tensor is not None:
                pieces.append(TensorPiece(delta.site, part, tuple(tensor.shape)))
                parts.append(tensor)
                factors.append(delta.factor if part == "b" else 1.0)
    has_gains = any(piece.part in ("gain", "scale", "norm") for piece in pieces)
    flat, copies = flatten_noting(parts, dtype, factors)
    return Packed(flat, pieces, summable=not has_gains, copies=copies)


class AffineBank(Bank):
    """Slots of adapters that change sites affinely."""

    max_span = sys.maxsize  # its kernels compute prefill, too

    def __init__(self, base: Base, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.sites = base.sites
        self.loaded: list[LoadedSlot | None] = [None] * (slots + 1)
        names = [name for name, site in base.sites.items() if site.kind in ("linear", "embedding", "norm")]
        self.table = SiteTable(names, slots, kernel.COLUMNS, device)
        self.use_gpu_kernels = gpu.uses_triton(device)
        self.use_cpu_kernels = (
            AVAILABLE and not self.use_gpu_kernels and device.type == "cpu" and dtype == torch.float32
        )
        self._with_norms: set[int] = set()  # slots whose adapters bring norms
        self._touched_by_slots: dict[frozenset[int], dict[str, int]] = {}  # -> sites they touch
        self._layouts = SlotLayouts(self.table)

    def put(self, slot: int, packed: Packed) -> None:
        """Fill an empty slot. On a CPU this copies nothing: the bank uses the host buffer."""
        flat = packed.flat.to(self.device, non_blocking=True)
        layout = self._layouts.of(packed.layout, flat.itemsize)
        loaded = self.loaded[slot] = LoadedSlot(flat, layout, aligned=self.use_gpu_kernels)
        if layout.norms:
            self._with_norms.add(slot)
        if self.use_cpu_kernels:
            self.table.fill(slot, layout.rows(flat.data_ptr()), layout.mask, layout.rank)
        else:
            entries = {name: table_row(loaded.deltas[name]) for name in layout.ways}
            self.table.put(slot, entries, layout.rank)
        self._touched_by_slots.clear()

    def clear(self, slot: int) -> None:
        self.table.clear(slot)
        self.loaded[slot] = None
        self._with_norms.discard(slot)
        self._touched_by_slots.clear()

    def delta(self, slot: int, site: str) -> AffineDelta | None:
        """What this slot's adapter does at a site, if anything."""
        loaded = self.loaded[slot]
        return loaded.deltas.get(site) if loaded and site in loaded.layout.ways else None

    def biases(
        self, sites: Sequence[Site], columns: Sequence[slice], rows: TokenSpans, count: int
    ) -> Biases | None:
        """See Bank. None where our kernels do not run, or no adapter has a bias there."""
        if not self.use_cpu_kernels or not self._are_adjacent(sites) or not self._ways(sites, rows) & BIAS:
            return None
        rows.check_count(count)
        rows.bias_applied.update(site.name for site in sites)
        first = self.table.numbers[sites[0].name]
        return Biases(rows.by_token(count), self.table.rows, first, columns)

    def affine(
        self, site: Site, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans, bias: torch.Tensor | None
    ) -> None:
        if site.name in rows.applied:
            rows.applied.discard(site.name)
        elif site.name not in self._touched(rows):
            return
        elif self._has_kernel(site):
            self._launch([site], x, y, rows, bias)
        rows.check_count(len(x))
        for slot, start, end, weight in rows.other_spans if self._has_kernel(site) else rows.spans:
            if delta := self.delta(slot, site.name):
                apply(delta, site, x[start:end], y[start:end], bias, weight)

    def joint(
        self,
        sites: Sequence[Site],
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,
        bias: torch.Tensor | None,
    ) -> None:
        """One launch for all sites, if a kernel computes them and they are adjacent in its table."""
        if not self._has_kernel(sites[0]) or not self._are_adjacent(sites):
            return
        if self._ways(sites, rows):
            self._launch(sites, x, y, rows, bias)
        rows.applied.update(site.name for site in sites)

    def norm(self, site: Site, parts: NormParts, x: torch.Tensor, y: torch.Tensor, rows: TokenSpans) -> None:
        replaced = rows.gather(lambda slot: self._norm(slot, site.name))
        if replaced is None:
            return
        rows.check_count(len(x))
        tokens, norms = replaced  # [n], [n, 1 or 2, hidden]
        fixed, scaled = parts(x[tokens])
        y[tokens] = fixed + scaled * norms[:, 0] + (norms[:, 1] if site.bias else 0)

    def acts(self, hook: str, slots: Iterable[int]) -> bool:
        """The hook `norm` acts only if one of the slots replaces norms: other batches do not pay for it."""
        if hook != "norm":
            return super().acts(hook, slots)
        return bool(self._with_norms) and not self._with_norms.isdisjoint(slots)

    def recorded_sites(self, slot: int) -> RecordedSites | None:
        """None for an adapter that replaces norms: its tokens are found on the host, during the step."""
        if slot in self._with_norms:
            return None
        mask, ranks = self.table.masks[slot], self.table.ranks[slot]
        if self.use_cpu_kernels:
            loaded = self.loaded[slot]
            biased = loaded.layout.biased if loaded else 0
            return RecordedSites(mask & ~biased, ranks, biased)
        return RecordedSites(mask, ranks) if self.use_gpu_kernels else None

    def touched(self, recorded: RecordedSites) -> dict[str, int]:
        touched = dict.fromkeys(self.table.among(recorded.biased), BIAS)
        for name in self.table.among(recorded.mask):
            way = SCALE if self.sites[name].kind == "norm" else MATRICES
            touched[name] = way | touched.get(name, 0)
        return touched

    def _norm(self, slot: int, site: str) -> torch.Tensor | None:
        loaded = self.loaded[slot]
        return loaded.deltas[site].norm if loaded and site in loaded.layout.norms else None

    def _are_adjacent(self, sites: Sequence[Site]) -> bool:
        """Whether the sites are adjacent in the table, in this order."""
        numbers = [self.table.numbers[site.name] for site in sites]
        return numbers == list(range(numbers[0], numbers[0] + len(sites)))

    def _has_kernel(self, site: Site) -> bool:
        """Whether a kernel computes `kernel_spans` at this site."""
        return self.use_gpu_kernels or (self.use_cpu_kernels and site.kind != "embedding")

    def _launch(
        self,
        sites: Sequence[Site],
        x: torch.Tensor,
        y: torch.Tensor,
        rows: TokenSpans,
        bias: torch.Tensor | None,
    ) -> None:
        rows.check_count(len(x))
        ways, first = self._ways(sites, rows), self.table.numbers[sites[0].name]
        heavy, widths = bool(ways & MATRICES), [site.outputs for site in sites]
        if not self.use_gpu_kernels:
            biases_applied = sites[0].name in rows.bias_applied
            rows.bias_applied.difference_update(site.name for site in sites)
            if len(rows.tokens) and not (biases_applied and ways == BIAS):
                entries = (rows.tokens, rows.slots, self.table.rows)
                kernel.grouped_affine(
                    x, y, *entries, first, widths, bias, has_matrices=heavy, add_bias_only=not biases_applied
                )
            return
        from server.kernels.gpu.grouped_affine import grouped_affine  # Triton is not everywhere

        plan = rows.block_plan(self.device, self.table.ranks.__getitem__)
        grouped_affine(x, y, plan, self.table.rows, first, widths, bias, has_matrices=heavy)

    def _ways(self, sites: Sequence[Site], rows: TokenSpans) -> int:
        """How these rows' adapters change the sites, all bits or-ed."""
        touched, ways = self._touched(rows), 0
        for site in sites:
            ways |= touched.get(site.name, 0)
        return ways

    def _touched(self, rows: TokenSpans) -> dict[str, int]:
        """`rows.touched`, computed once for each set of slots."""
        if rows.touched is None:
            slots = frozenset(span.slot for span in rows.spans)
            if slots not in self._touched_by_slots:
                if len(self._touched_by_slots) >= MAX_TOUCHED_SETS:
                    self._touched_by_slots.clear()
                union: dict[str, int] = {}
                for loaded in (self.loaded[slot] for slot in slots):
                    for name, way in loaded.layout.ways.items() if loaded else ():
                        union[name] = way | union.get(name, 0)
                self._touched_by_slots[slots] = union
            rows.touched = self._touched_by_slots[slots]
        return rows.touched


def table_row(delta: AffineDelta) -> list[int]:
    """The COLUMNS numbers of a delta that kernels read."""
    parts = (delta.a, delta.b, delta.gain, delta.bias)
    rank = 0 if delta.b is None else delta.b.shape[0]
    assert rank <= MAX_RANK, f"rank {rank} is over the kernel's scratch"
    item = 0 if delta.b is None else delta.b.itemsize
    return [*(0 if t is None else t.data_ptr() for t in parts), rank, item]


def apply(
    delta: AffineDelta,
    site: Site,
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    weight: float = 1.0,
) -> None:
    """Apply one adapter to its tokens y [n, out] in place; x [n, in], or [n] token ids of an embedding.

    The reference implementation of the kernels, for one span. `bias` [out] is the base's. `weight` scales
    what is added; an adapter with a gain is never weighted.
    """
    if delta.gain is not None:
        product = y.clone() if bias is None else y - bias  # a copy: autograd keeps it while y changes
        y.addcmul_(delta.gain, product)
    if delta.a is not None and delta.b is not None:
        if site.kind == "embedding":
            has_row = x >= 0  # virtual tokens have no row in a table
            y[has_row] += weight * (delta.a[x[has_row]] @ delta.b)
        else:
            a, b = (matrix.to(x.dtype) for matrix in (delta.a, delta.b))
            y.addmm_(x @ a.T, b, alpha=weight)
    if delta.bias is not None:
        y.add_(delta.bias, alpha=weight)
