"""paged_attention.py on a GPU: writing K and V, and attention of one new token a row. Many tokens a row:
prefill_attention.py.

Pages are those of paged_attention.py: keys [blocks, kv_heads, head_dim, BLOCK], values [blocks, kv_heads,
BLOCK, head_dim]. All addresses come from tables on the device, so a launch can be recorded once and replayed.

Decode: one program takes a row, a KV head and a share of the past; the query heads of a group are the rows of
one product, so that K and V are read once. A second launch combines the shares. Memory beyond a row's length
never affects the result: a freed page may hold anything, NaN included.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from server.kernels.cpu.paged_attention import BLOCK, AttentionOptions
from server.kernels.gpu.common import DTYPES, INTERPRETED, dot_type

TARGET_PROGRAMS = 24 if INTERPRETED else 512  # of a decode launch, about: enough for a large device
KEY_BLOCK = 64  # past tokens per iteration


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    k,
    v,
    keys,
    values,
    places,
    k_token,
    k_head,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,  # DIM up to a power of two
    PAGE: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(places + token)
    if place < 0:
        return
    d = tl.arange(0, WIDE)
    page = (place // PAGE * HEADS + head) * DIM * PAGE
    own_k = tl.load(k + token * k_token + head * k_head + d, mask=d < DIM)
    own_v = tl.load(v + token * v_token + head * v_head + d, mask=d < DIM)
    tl.store(keys + page + d * PAGE + place % PAGE, own_k, mask=d < DIM)
    tl.store(values + page + place % PAGE * DIM + d, own_v, mask=d < DIM)


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q,  # [BLOCK, WIDE], scaled
    position,  # [BLOCK]: of each query
    low,
    high,  # past tokens [low, high) are read, from a multiple of KEY_BLOCK on
    table,
    keys,
    values,
    head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Softmax in one pass: (greatest score [BLOCK], sum of weights [BLOCK], weighted sum of values [BLOCK,
    WIDE]).
    """
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, WIDE), tl.float32)
    d = tl.arange(0, WIDE)
    for start in range(low // KEY_BLOCK * KEY_BLOCK, high, KEY_BLOCK):
        t = start + tl.arange(0, KEY_BLOCK)
        seen = (t >= low) & (t < high)
        block = tl.load(table + t // PAGE, mask=t // PAGE < tl.cdiv(high, PAGE), other=0)
        page = (block * HEADS + head) * (DIM * PAGE)
        # Keys of whole pages, for loads of 16 bytes; tokens that the row may not see are masked below.
        k = tl.load(
            keys + page[None, :] + d[:, None] * PAGE + (t % PAGE)[None, :],
            mask=(d < DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q.to(DOT), k.to(DOT), input_precision="ieee")
        if SOFTCAP > 0:
            scores = SOFTCAP * (2 * tl.sigmoid(2 * scores / SOFTCAP) - 1)
        visible = seen[None, :] & (t[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (t[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        greatest = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(greatest == float("-inf"), 0.0, greatest)  # no visible token yet
        weights = tl.exp(scores - base[:, None])
        shrunk = tl.exp(top - base)
        v = tl.load(
            values + page[:, None] + (t % PAGE)[:, None] * DIM + d[None, :],
            mask=seen[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        total = total * shrunk + tl.sum(weights, 1)
        out = out * shrunk[:, None]
        out = tl.dot(weights.to(DTYPE).to(DOT), v.to(DOT), out, input_precision="ieee")
        top = greatest
    return top, total, out


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    tables,
    lengths,
    out,  # [R, heads, DIM]
    parts,  # float32 [R, heads, SHARES, WIDE + 2]: sum of values, greatest score, sum of weights
    q_token,
    q_head,
    table_stride,
    scale,
    HEADS: tl.constexpr,  # of keys and values
    GROUP: tl.constexpr,  # query heads of each
    BLOCK: tl.constexpr,  # GROUP up to the minimum of a product
    SHARES: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    row, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    each = tl.cdiv(tl.cdiv(length - first, SHARES), KEY_BLOCK) * KEY_BLOCK
    low = first + share * each
    high = tl.minimum(low + each, length)
    g, d = tl.arange(0, BLOCK), tl.arange(0, WIDE)
    mine = (g < GROUP)[:, None] & (d < DIM)[None, :]
    at = q + row * q_token + (head * GROUP + g)[:, None] * q_head + d[None, :]
    scaled = (tl.load(at, mask=mine, other=0.0).to(tl.float32) * scale).to(DTYPE)
    position = tl.zeros((BLOCK,), tl.int64) + length - 1
    table = tables + row * table_stride
    top, total, sums = attend(
        *(scaled, position, low, high, table, keys, values, head),
        *(HEADS, DIM, WIDE, PAGE, BLOCK, KEY_BLOCK, WINDOW, SOFTCAP, DTYPE, DOT),
    )
    heads = row * HEADS * GROUP + head * GROUP + g
    if SHARES == 1:
        result = sums / tl.where(total == 0, 1.0, total)[:, None]  # a row of no tokens gives zeros
        tl.store(out + heads[:, None] * DIM + d[None, :], result.to(DTYPE), mask=mine)
    else:
        part = parts + (heads * SHARES + share) * (WIDE + 2)
        tl.store(part[:, None] + d[None, :], sums, mask=mine)
        tl.store(part + WIDE, top, mask=g < GROUP)
        tl.store(part + WIDE + 1, total, mask=g < GROUP)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    parts,
    out,
    SHARES: tl.constexpr,
    MANY: tl.constexpr,  # SHARES up to a power of two
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    s, d = tl.arange(0, MANY), tl.arange(0, WIDE)
    part = parts + (tl.program_id(0) * SHARES + s) * (WIDE + 2)
    top = tl.load(part + WIDE, mask=s < SHARES, other=float("-inf"))
    greatest = tl.max(top, 0)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    factor = tl.exp(top - base)
    total = tl.sum(factor * tl.load(part + WIDE + 1, mask=s < SHARES, other=0.0), 0)
    sums = tl.load(part[:, None] + d[None, :], mask=(s < SHARES)[:, None] & (d < DIM)[None, :], other=0.0)
    result = tl.sum(sums * factor[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + tl.program_id(0) * DIM + d, result.to(DTYPE), mask=d < DIM)


def write_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    k: torch.Tensor,  # [T, kv_heads, head_dim], heads contiguous
    v: torch.Tensor,
    positions: torch.Tensor,  # int64 [T]: block * BLOCK + offset; negative: nowhere
) -> None:
    """Write each token's K and V to the pages, at its position."""
    tokens, heads, dim = k.shape
    _write[tokens, heads](
        *(k, v, keys, values, positions, k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        HEADS=heads,
        DIM=dim,
        WIDE=triton.next_power_of_2(dim),
        PAGE=BLOCK,
    )


def decode_attention(
    q: torch.Tensor,  # [R, heads, head_dim], heads contiguous: one new token a row
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,  # int64 [R, most blocks]
    lengths: torch.Tensor,  # int64 [R], the new token included, whose K and V are in their pages
    options: AttentionOptions,
    out: torch.Tensor,  # [R, heads, head_dim], contiguous
) -> None:
    """Attention of each row's new token over its pages, written to `out`."""
    rows, heads, _ = q.shape
    kv_heads = keys.shape[1]
    shares = max(1, min(16, TARGET_PROGRAMS // (rows * kv_heads)))
    fixed = constants(q, keys, options)
    wide = fixed["WIDE"]
    parts = q.new_empty((rows, heads, shares, wide + 2) if shares > 1 else 0, dtype=torch.float32)
    _decode[rows, kv_heads, shares](
        *(q, keys, values, tables, lengths, out, parts),
        *(q.stride(0), q.stride(1), tables.stride(0), options.scale),
        BLOCK=max(16, triton.next_power_of_2(heads // kv_heads)),
        SHARES=shares,
        **fixed,
    )
    if shares > 1:
        _combine[(rows * heads,)](
            *(parts, out),
            SHARES=shares,
            MANY=triton.next_power_of_2(shares),
            **{name: fixed[name] for name in ("DIM", "WIDE", "DTYPE")},
        )


def constants(q: torch.Tensor, keys: torch.Tensor, options: AttentionOptions) -> dict[str, Any]:
    """Compile-time constants of the attention kernels, for q [T, heads, head_dim] and key pages."""
    dim, kv_heads = q.shape[2], keys.shape[1]
    return {
        "HEADS": kv_heads,
        "GROUP": q.shape[1] // kv_heads,
        "DIM": dim,
        "WIDE": max(16, triton.next_power_of_2(dim)),
        "PAGE": BLOCK,
        "KEY_BLOCK": 16 if INTERPRETED else KEY_BLOCK,  # so that small tests take several iterations
        "WINDOW": options.window,
        "SOFTCAP": float(options.softcap),
        "DTYPE": DTYPES[q.dtype],
        "DOT": dot_type(q.dtype),
    }
