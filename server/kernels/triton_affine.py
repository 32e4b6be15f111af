"""affine.py on a GPU: y += gain * (y - b) + B (A x) + bias, each block of tokens with its own adapter.

Two launches a group of sites that see the same x (q, k and v; gate and up): `_shrink` gives B's input for
all of them, cut along x's width into splits whose sums `_expand` adds up. No atomics: a row's result does
not depend on timing. An adapter of rank 8 costs rank 8: blocks of ranks beyond an adapter's own end at once,
and so do blocks of slot 0.

The tables of all sites lie in one: int64 [slots, sites, COLUMNS], columns as in affine.py. Sites of a group
stand side by side in it, as their columns do in y. Accumulation is in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from server.kernels.affine import COLUMNS
from server.kernels.gpu import FIELDS, RANK_STEP, SMALL, Plan
from server.kernels.triton_types import DTYPES, dot_type

DEPTH = 1024  # of x's width a split takes at least
SPLITS = 8  # at most


@triton.jit
def _shrink(  # type: ignore[no-untyped-def]
    x,  # [T, fan_in]; of an embedding ids [T]
    table,
    order,
    blocks,
    h,  # float32 [SPLITS, n, SITES, RANKS]
    x_stride,
    n,
    first_site,
    sites,
    fan_in,
    EMBEDDING: tl.constexpr,
    SITES: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    slot = tl.load(blocks + tl.program_id(0) * FIELDS)
    if slot == 0:
        return
    site = tl.program_id(1) // (RANKS // STEP)
    first_rank = tl.program_id(1) % (RANKS // STEP) * STEP
    entry = table + (slot * sites + first_site + site) * COLUMNS
    rank = tl.load(entry + 4)
    if first_rank >= rank:
        return
    first = tl.load(blocks + tl.program_id(0) * FIELDS + 1)
    count = tl.load(blocks + tl.program_id(0) * FIELDS + 2)
    split = tl.program_id(2)
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
    place = tl.arange(0, BLOCK)
    tokens = tl.load(order + first + place, mask=place < count, other=0)
    ranks = first_rank + tl.arange(0, STEP)
    total = tl.zeros((BLOCK, STEP), tl.float32)
    if EMBEDDING:
        ids = tl.load(x + tokens)
        real = (place < count) & (ids >= 0)  # virtual tokens have no row in a table
        at = a + ids[:, None] * rank + ranks[None, :]
        total += tl.load(at, mask=real[:, None] & (ranks < rank)[None, :], other=0.0).to(tl.float32)
    else:
        share = tl.cdiv(tl.cdiv(fan_in, BLOCK_K), SPLITS) * BLOCK_K
        for start in range(split * share, tl.minimum(fan_in, (split + 1) * share), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            within = k < fan_in
            part = tl.load(
                x + tokens[:, None] * x_stride + k[None, :],
                mask=(place < count)[:, None] & within[None, :],
                other=0.0,
            )
            weights = tl.load(
                a + ranks[None, :] * fan_in + k[:, None],
                mask=(ranks < rank)[None, :] & within[:, None],
                other=0.0,
            )
            total = tl.dot(part.to(DOT), weights.to(DOT), total, input_precision="ieee")
    at = h + (((split * n + first + place)[:, None] * SITES) + site) * RANKS + ranks[None, :]
    tl.store(at, total, mask=(place < count)[:, None])


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    y,  # [T, out of all sites]
    base_bias,  # [out of all sites], if HAS_BIAS
    table,
    order,
    blocks,
    h,
    y_stride,
    n,
    first_site,
    sites,
    OUT0: tl.constexpr,
    OUT1: tl.constexpr,
    OUT2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RANKS: tl.constexpr,  # False: nobody has matrices here, and h holds nothing
    SITES: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    slot = tl.load(blocks + tl.program_id(0) * FIELDS)
    if slot == 0:
        return
    tile = tl.program_id(1)
    tiles0: tl.constexpr = (OUT0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = (OUT1 + BLOCK_N - 1) // BLOCK_N
    site, outputs, offset = 0, OUT0, 0
    if SITES > 1 and tile >= tiles0:
        site, outputs, offset, tile = 1, OUT1, OUT0, tile - tiles0
        if SITES > 2 and tile >= tiles1:
            site, outputs, offset, tile = 2, OUT2, OUT0 + OUT1, tile - tiles1
    entry = table + (slot * sites + first_site + site) * COLUMNS
    rank = tl.load(entry + 4)
    gain = tl.load(entry + 2)
    bias = tl.load(entry + 3)
    if (rank == 0) & (gain == 0) & (bias == 0):
        return
    first = tl.load(blocks + tl.program_id(0) * FIELDS + 1)
    count = tl.load(blocks + tl.program_id(0) * FIELDS + 2)
    place = tl.arange(0, BLOCK)
    tokens = tl.load(order + first + place, mask=place < count, other=0)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within = columns < outputs
    inside = (place < count)[:, None] & within[None, :]
    at = y + tokens[:, None] * y_stride + (offset + columns)[None, :]
    own = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    if HAS_RANKS:
        b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(DTYPE)), 16)
        for start in range(0, rank, STEP):
            ranks = start + tl.arange(0, STEP)
            having = ranks < rank
            low = tl.zeros((BLOCK, STEP), tl.float32)
            for split in tl.static_range(SPLITS):
                low += tl.load(
                    h + (((split * n + first + place)[:, None] * SITES) + site) * RANKS + ranks[None, :],
                    mask=(place < count)[:, None],  # ranks beyond its own are zeros there
                    other=0.0,
                )
            weights = tl.load(
                b + ranks[:, None] * outputs + columns[None, :],
                mask=having[:, None] & within[None, :],
                other=0.0,
            )
            total = tl.dot(low.to(DTYPE).to(DOT), weights.to(DOT), total, input_precision="ieee")
    if gain != 0:
        gains = tl.multiple_of(gain.to(tl.pointer_type(DTYPE)), 16)
        factor = tl.load(gains + columns, mask=within, other=0.0).to(tl.float32)
        if HAS_BIAS:
            base = tl.load(base_bias + offset + columns, mask=within, other=0.0).to(tl.float32)
            total += factor[None, :] * (own - base[None, :])
        else:
            total += factor[None, :] * own
    if bias != 0:
        biases = tl.multiple_of(bias.to(tl.pointer_type(DTYPE)), 16)
        total += tl.load(biases + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    tl.store(at, (own + total).to(DTYPE), mask=inside)


def grouped_affine(
    x: torch.Tensor,  # [T, in], rows contiguous; of an embedding int64 ids [T], negative: no row of a table
    y: torch.Tensor,  # [T, out of all sites], rows contiguous, changed in place
    plan: Plan,
    tables: torch.Tensor,  # int64 [slots, sites, COLUMNS], on the device
    first_site: int,
    outputs: Sequence[int],  # of each site of the group, up to three
    base_bias: torch.Tensor | None,  # [out of all sites]
    *,
    heavy: bool = True,  # False: nobody has matrices here
) -> None:
    """Add each token's adapter at one group of sites; tokens in no block stay as they are."""
    assert len(outputs) <= 3, "a group has three sites at most"
    embedding = x.dim() == 1
    n, groups = plan.order.shape[0], plan.blocks.shape[0]
    if not n or not groups:
        return
    splits = 1 if embedding else min(SPLITS, -(-x.shape[-1] // DEPTH))
    common = {
        "SITES": len(outputs),
        "RANKS": plan.ranks,
        "STEP": RANK_STEP,
        "SPLITS": splits,
        "BLOCK": plan.size,
        "DTYPE": DTYPES[y.dtype],
        "DOT": dot_type(y.dtype),
        "COLUMNS": COLUMNS,
        "FIELDS": FIELDS,
    }
    places = (tables, plan.order, plan.blocks)
    h = y.new_empty((splits, n, len(outputs), plan.ranks) if heavy else 0, dtype=torch.float32)
    if heavy:
        _shrink[groups, len(outputs) * (plan.ranks // RANK_STEP), splits](
            x,
            *places,
            h,
            *(x.stride(0), n, first_site, tables.shape[1], 0 if embedding else x.shape[-1]),
            EMBEDDING=embedding,
            BLOCK_K=128 if plan.size == SMALL else 64,
            **common,
        )
    block_n = 256 if plan.size == SMALL else 128
    padded = [*outputs, 0, 0][:3]
    _expand[groups, sum(-(-out // block_n) for out in outputs)](
        y,
        y if base_bias is None else base_bias,
        *places,
        h,
        *(y.stride(0), n, first_site, tables.shape[1]),
        *padded,
        HAS_BIAS=base_bias is not None,
        HAS_RANKS=heavy,
        BLOCK_N=block_n,
        num_warps=4 if plan.size == SMALL else 8,
        **common,
    )
