"""grouped_bottleneck.py on a GPU: h += U act(D x + d) + u, each block of tokens with its own adapter.

As in grouped_affine.py: `_down` computes D x for splits of x's width, and the sums of x's squares for its
root mean square; `_up` sums the splits and computes the rest.

Table: int64 [slots, sites, COLUMNS], columns as in grouped_bottleneck.py.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from server.kernels.cpu import grouped_bottleneck as bottleneck
from server.kernels.gpu.common import DTYPES, FIELDS, INTERPRETED, STEP, dot_type, members, splits_of, summed
from server.kernels.token_blocks import RANK_STEP, SMALL_BLOCK, BlockPlan

UNSPECIALIZED = ["n", "site", "sites"]  # arguments whose values need no kernel of their own
COLUMNS = tl.constexpr(bottleneck.COLUMNS)


@triton.jit
def _tanh(x, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    if PLAIN:  # the interpreter has no libdevice
        return 2 * tl.sigmoid(2 * x) - 1
    return libdevice.tanh(x)


@triton.jit
def _activate(z, kind, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """`kind` is an index of NON_LINEARITIES."""
    if kind == 1:
        z = tl.maximum(z, 0.0)
    elif kind == 2:
        z = tl.where(z < 0, 0.01 * z, z)
    elif kind == 3:
        z = _tanh(z, PLAIN)
    elif kind == 4:
        z = z * tl.sigmoid(z)
    elif kind == 5:
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif kind == 6:
        z = 0.5 * z * (1 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z), PLAIN))
    return z


@triton.jit
def _input(  # type: ignore[no-untyped-def]
    h, r, h_stride, r_stride, kind, tokens, k, inside, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """h, r or their sum, as INPUTS has them: float32 [BLOCK, BLOCK_K]."""
    x = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    if kind != 1:
        at = h + tokens[:, None] * h_stride + k[None, :]
        x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if kind != 0:
        at = r + tokens[:, None] * r_stride + k[None, :]
        x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _down(  # type: ignore[no-untyped-def]
    h,  # [T, hidden]
    r,  # [T, hidden]
    table,
    order,
    blocks,
    z,  # float32 [SPLITS, n, WIDTHS]
    squares,  # float32 [SPLITS, n]
    h_stride,
    r_stride,
    n,
    site,
    sites,
    hidden,
    WIDTHS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    slot = tl.load(blocks + tl.program_id(0) * FIELDS)
    if slot == 0:
        return
    entry = table + (slot * sites + site) * COLUMNS
    width = tl.load(entry + 4)
    if tl.program_id(1) * STEP >= width:
        return
    kind = tl.load(entry + 6)
    split = tl.program_id(2)
    down = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
    places, tokens, valid = members(blocks, order, BLOCK)
    rows = tl.program_id(1) * STEP + tl.arange(0, STEP)
    total = tl.zeros((BLOCK, STEP), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    share = tl.cdiv(tl.cdiv(hidden, BLOCK_K), SPLITS) * BLOCK_K
    for start in range(split * share, tl.minimum(hidden, (split + 1) * share), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (k < hidden)[None, :]
        x = _input(h, r, h_stride, r_stride, kind, tokens, k, inside, BLOCK, BLOCK_K).to(DTYPE)
        at = down + rows[None, :] * hidden + k[:, None]
        weights = tl.load(at, mask=(rows < width)[None, :] & (k < hidden)[:, None], other=0.0)
        total = tl.dot(x.to(DOT), weights.to(DOT), total, input_precision="ieee")
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    at = split * n + places
    tl.store(z + at[:, None] * WIDTHS + rows[None, :], total, mask=valid[:, None])
    if tl.program_id(1) == 0:
        tl.store(squares + at, square, mask=valid)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _up(  # type: ignore[no-untyped-def]
    h,
    table,
    order,
    blocks,
    z,
    squares,
    h_stride,
    n,
    site,
    sites,
    hidden,
    WIDTHS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    PLAIN: tl.constexpr,
):
    slot = tl.load(blocks + tl.program_id(0) * FIELDS)
    if slot == 0:
        return
    entry = table + (slot * sites + site) * COLUMNS
    width, kind, bits = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 7).to(tl.int32)
    if width == 0:
        return
    places, tokens, valid = members(blocks, order, BLOCK)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = columns < hidden
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if bits != 0:
        square = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            square += tl.load(squares + split * n + places, mask=valid, other=0.0)
        scale = tl.rsqrt(square / hidden + bits.to(tl.float32, bitcast=True))
    down_bias = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(DTYPE)), 16)
    up = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(DTYPE)), 16)
    up_bias = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(DTYPE)), 16)
    total = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for start in range(0, width, STEP):
        rows = start + tl.arange(0, STEP)
        bias = tl.load(down_bias + rows, mask=rows < width, other=0.0).to(tl.float32)
        low = summed(z, n, places, valid, rows, WIDTHS, SPLITS) * scale[:, None] + bias[None, :]
        low = _activate(low, kind, PLAIN).to(DTYPE)
        at = up + rows[:, None] * hidden + columns[None, :]
        weights = tl.load(at, mask=(rows < width)[:, None] & within[None, :], other=0.0)
        total = tl.dot(low.to(DOT), weights.to(DOT), total, input_precision="ieee")
    total += tl.load(up_bias + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    at = h + tokens[:, None] * h_stride + columns[None, :]
    own = tl.load(at, mask=valid[:, None] & within[None, :], other=0.0).to(tl.float32)
    tl.store(at, (own + total).to(DTYPE), mask=valid[:, None] & within[None, :])


def grouped_bottleneck(
    h: torch.Tensor,  # [T, hidden], rows contiguous, changed in place
    r: torch.Tensor,  # [T, hidden], rows contiguous
    plan: BlockPlan,
    tables: torch.Tensor,  # int64 [slots, sites, COLUMNS], on the device
    site: int,
) -> None:
    """Add each token's adapter to h, at one site; tokens in no block stay unchanged."""
    n, groups, hidden = plan.order.shape[0], plan.blocks.shape[0], h.shape[1]
    if not n or not groups:
        return
    splits = splits_of(hidden)
    common = {
        "WIDTHS": plan.ranks,
        "SPLITS": splits,
        "BLOCK": plan.size,
        "DTYPE": DTYPES[h.dtype],
        "DOT": dot_type(h.dtype),
    }
    z = h.new_empty(splits, n, plan.ranks, dtype=torch.float32)
    squares = h.new_empty(splits, n, dtype=torch.float32)
    shared = (tables, plan.order, plan.blocks, z, squares)
    _down[groups, plan.ranks // RANK_STEP, splits](
        *(h, r, *shared, h.stride(0), r.stride(0), n, site, tables.shape[1], hidden), BLOCK_K=64, **common
    )
    block_n = 256 if plan.size == SMALL_BLOCK else 128
    _up[groups, -(-hidden // block_n)](
        *(h, *shared, h.stride(0), n, site, tables.shape[1], hidden),
        BLOCK_N=block_n,
        num_warps=4 if plan.size == SMALL_BLOCK else 8,
        PLAIN=INTERPRETED,
        **common,
    )
