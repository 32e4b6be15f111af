"""paged_attention.py's prefill on a GPU: chunks of many rows in one launch, over their pages in place.

A program takes PROGRAM_QUERIES tokens of one row and one head. The rows' own K and V are in their pages
already.
"""

import torch
import triton
import triton.language as tl

from server.kernels.cpu.paged_attention import AttentionOptions
from server.kernels.gpu.decode_attention import attend, constants

PROGRAM_QUERIES = 64  # tokens


@triton.jit
def _chunks(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    tables,
    chunks,  # [programs, 4]: row of the tables, first token in q, how many, position of the first
    out,
    q_token,
    q_head,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    head = tl.program_id(1)
    chunk = chunks + tl.program_id(0) * 4
    row, first, count, begin = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    m, d = tl.arange(0, BLOCK), tl.arange(0, WIDE)
    mine = (m < count)[:, None] & (d < DIM)[None, :]
    at = q + (first + m)[:, None] * q_token + head * q_head + d[None, :]
    scaled = (tl.load(at, mask=mine, other=0.0).to(tl.float32) * scale).to(DTYPE)
    low = tl.maximum(begin - WINDOW + 1, 0) if WINDOW > 0 else begin * 0
    _, total, sums = attend(
        *(scaled, begin + m, low, begin + count, tables + row * table_stride, keys, values, head // GROUP),
        *(HEADS, DIM, WIDE, PAGE, BLOCK, KEY_BLOCK, WINDOW, SOFTCAP, DTYPE, DOT),
    )
    result = sums / tl.where(total == 0, 1.0, total)[:, None]
    at = out + ((first + m) * HEADS * GROUP + head)[:, None] * DIM + d[None, :]
    tl.store(at, result.to(DTYPE), mask=mine)


def chunk_attention(
    q: torch.Tensor,  # [T, heads, head_dim], heads contiguous
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,  # int64 [rows, most blocks]
    chunks: torch.Tensor,  # int64 [programs, 4], as `cut_chunks` gives them
    options: AttentionOptions,
    out: torch.Tensor,  # [T, heads, head_dim], contiguous
) -> None:
    """Causal attention of many tokens a row over their pages, which hold their own K and V already, written
    to `out`.
    """
    if chunks.shape[0]:
        _chunks[chunks.shape[0], q.shape[1]](
            *(q, keys, values, tables, chunks, out),
            *(q.stride(0), q.stride(1), tables.stride(0), options.scale),
            BLOCK=PROGRAM_QUERIES,
            num_stages=3 if q.shape[2] <= 128 else 2,  # more would not fit into shared memory
            **constants(q, keys, options),
        )


def cut_chunks(spans: list[tuple[int, int, int, int]]) -> list[int]:
    """Cut spans (row of the tables, first token, count, position of the first), one for each row in prefill,
    into spans of PROGRAM_QUERIES tokens, one for each program: flat.
    """
    return [
        value
        for row, first, count, begin in spans
        for offset in range(0, count, PROGRAM_QUERIES)
        for value in (row, first + offset, min(PROGRAM_QUERIES, count - offset), begin + offset)
    ]
