"""cpu/grouped_affine.py on a GPU: y += gain * (y - b) + B (A x) + bias, each token block with its adapter.

Two launches for a group of sites that see the same x (q, k and v; gate and up): `_shrink` computes A x for
all of them, cut along x's width into splits, which `_expand` sums. No atomics: a row's result does not depend
on timing. An adapter of rank 8 costs rank 8: programs of ranks beyond an adapter's own end at once, and so do
programs of slot 0.

One table has all sites: int64 [slots, sites, COLUMNS], columns as in cpu/grouped_affine.py. Sites of a group
are adjacent in it, as their columns are in y. Accumulation is in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from server.kernels.cpu import grouped_affine as affine
from server.kernels.gpu.common import DTYPES, FIELDS, STEP, dot_type, members, splits_of, summed
from server.kernels.token_blocks import RANK_STEP, SMALL_BLOCK, BlockPlan

UNSPECIALIZED = ["n", "first_site", "sites"]  # arguments whose values need no kernel of their own
COLUMNS = tl.constexpr(affine.COLUMNS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _shrink(  # type: ignore[no-untyped-def]
    x,  # [T, fan_in]; of an embedding ids [T]
    table,
    order,
    blocks,
    h,  # float32 [SPLITS, n, SITES * RANKS]
    x_stride,
    n,
    first_site,
    sites,
    fan_in,
    EMBEDDING: tl.constexpr,
    SITES: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    slot = tl.load(blocks + tl.program_id(0) * FIELDS)
    if slot == 0:
        return
    site = tl.program_id(1) // (RANKS // STEP)
    ranks = tl.program_id(1) % (RANKS // STEP) * STEP + tl.arange(0, STEP)
    entry = table + (slot * sites + first_site + site) * COLUMNS
    rank = tl.load(entry + 4)
    if tl.program_id(1) % (RANKS // STEP) * STEP >= rank:
        return
    split = tl.program_id(2)
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
    places, tokens, valid = members(blocks, order, BLOCK)
    total = tl.zeros((BLOCK, STEP), tl.float32)
    if EMBEDDING:
        ids = tl.load(x + tokens)
        real = valid & (ids >= 0)  # virtual tokens have no row in a table
        at = a + ids[:, None] * rank + ranks[None, :]
        total += tl.load(at, mask=real[:, None] & (ranks < rank)[None, :], other=0.0).to(tl.float32)
    else:
        share = tl.cdiv(tl.cdiv(fan_in, BLOCK_K), SPLITS) * BLOCK_K
        for start in range(split * share, tl.minimum(fan_in, (split + 1) * share), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at = x + tokens[:, None] * x_stride + k[None, :]
            part = tl.load(at, mask=valid[:, None] & (k < fan_in)[None, :], other=0.0)
            at = a + ranks[None, :] * fan_in + k[:, None]
            weights = tl.load(at, mask=(ranks < rank)[None, :] & (k < fan_in)[:, None], other=0.0)
            total = tl.dot(part.to(DOT), weights.to(DOT), total, input_precision="ieee")
    at = h + (split * n + places)[:, None] * (SITES * RANKS) + site * RANKS + ranks[None, :]
    tl.store(at, total, mask=valid[:, None])


@triton.jit
def _site_of(  # type: ignore[no-untyped-def]
    tile, OUT0: tl.constexpr, OUT1: tl.constexpr, OUT2: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of the group's columns: its site, its number there, the site's width and first column."""
    tiles0: tl.constexpr = (OUT0 + BLOCK_N - 1) // BLOCK_N
    tiles1: tl.constexpr = (OUT1 + BLOCK_N - 1) // BLOCK_N
    site, outputs, first = 0, OUT0, 0
    if OUT1 > 0 and tile >= tiles0:
        site, outputs, first, tile = 1, OUT1, OUT0, tile - tiles0
        if OUT2 > 0 and tile >= tiles1:
            site, outputs, first, tile = 2, OUT2, OUT0 + OUT1, tile - tiles1
    return site, tile, outputs, first


@triton.jit
def _affine(  # type: ignore[no-untyped-def]
    entry, own, columns, outputs, base_bias, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr
):
    """gain * (own - base_bias) + bias, of those that the adapter has: float32 like own."""
    within = columns < outputs
    total = tl.zeros_like(own)
    gain, bias = tl.load(entry + 2), tl.load(entry + 3)
    if gain != 0:
        at = tl.multiple_of(gain.to(tl.pointer_type(DTYPE)), 16)
        factor = tl.load(at + columns, mask=within, other=0.0).to(tl.float32)
        if HAS_BIAS:
            base = tl.load(base_bias + columns, mask=within, other=0.0).to(tl.float32)
            total += factor[None, :] * (own - base[None, :])
        else:
            total += factor[None, :] * own
    if bias != 0:
        at = tl.multiple_of(bias.to(tl.pointer_type(DTYPE)), 16)
        total += tl.load(at + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
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
    HAS_RANKS: tl.constexpr,  # False: no adapter of the batch has A and B here, and h is empty
    SITES: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    slot = tl.load(blocks + tl.program_id(0) * FIELDS)
    if slot == 0:
        return
    site, tile, outputs, first_column = _site_of(tl.program_id(1), OUT0, OUT1, OUT2, BLOCK_N)
    entry = table + (slot * sites + first_site + site) * COLUMNS
    rank = tl.load(entry + 4)
    if (rank == 0) & (tl.load(entry + 2) == 0) & (tl.load(entry + 3) == 0):
        return
    places, tokens, valid = members(blocks, order, BLOCK)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within = columns < outputs
    at = y + tokens[:, None] * y_stride + (first_column + columns)[None, :]
    own = tl.load(at, mask=valid[:, None] & within[None, :], other=0.0).to(tl.float32)
    total = _affine(entry, own, columns, outputs, base_bias + first_column, HAS_BIAS, DTYPE)
    if HAS_RANKS:
        b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(DTYPE)), 16)
        for start in range(0, rank, STEP):
            ranks = start + tl.arange(0, STEP)
            low = summed(h, n, places, valid, site * RANKS + ranks, SITES * RANKS, SPLITS)
            ahead = b + ranks[:, None] * outputs + columns[None, :]
            weights = tl.load(ahead, mask=(ranks < rank)[:, None] & within[None, :], other=0.0)
            total = tl.dot(low.to(DTYPE).to(DOT), weights.to(DOT), total, input_precision="ieee")
    tl.store(at, (own + total).to(DTYPE), mask=valid[:, None] & within[None, :])


def grouped_affine(
    x: torch.Tensor,  # [T, in], rows contiguous; of an embedding int64 ids [T], negative: no row of a table
    y: torch.Tensor,  # [T, out of all sites], rows contiguous, changed in place
    plan: BlockPlan,
    tables: torch.Tensor,  # int64 [slots, sites, COLUMNS], on the device
    first_site: int,
    outputs: Sequence[int],  # of each site of the group, up to three
    base_bias: torch.Tensor | None,  # [out of all sites]
    *,
    has_matrices: bool = True,  # False: no adapter of the batch has A and B here
) -> None:
    """Add each token's adapter to y, at one group of sites; tokens in no block stay unchanged."""
    assert len(outputs) <= 3, "a group has three sites at most"
    embedding = x.dim() == 1
    n, groups = plan.order.shape[0], plan.blocks.shape[0]
    if not n or not groups:
        return
    splits = 1 if embedding else splits_of(x.shape[-1])
    common = {
        "SITES": len(outputs),
        "RANKS": plan.ranks,
        "SPLITS": splits,
        "BLOCK": plan.size,
        "DTYPE": DTYPES[y.dtype],
        "DOT": dot_type(y.dtype),
    }
    places = (tables, plan.order, plan.blocks)
    h = y.new_empty((splits, n, len(outputs) * plan.ranks) if has_matrices else 0, dtype=torch.float32)
    if has_matrices:
        _shrink[groups, len(outputs) * (plan.ranks // RANK_STEP), splits](
            x,
            *places,
            h,
            *(x.stride(0), n, first_site, tables.shape[1], 0 if embedding else x.shape[-1]),
            EMBEDDING=embedding,
            BLOCK_K=128 if plan.size == SMALL_BLOCK else 64,
            **common,
        )
    block_n = 256 if plan.size == SMALL_BLOCK else 128
    padded = [*outputs, 0, 0][:3]
    _expand[groups, sum(-(-out // block_n) for out in outputs)](
        y,
        y if base_bias is None else base_bias,
        *places,
        h,
        *(y.stride(0), n, first_site, tables.shape[1]),
        *padded,
        HAS_BIAS=base_bias is not None,
        HAS_RANKS=has_matrices,
        BLOCK_N=block_n,
        num_warps=4 if plan.size == SMALL_BLOCK else 8,
        **common,
    )
