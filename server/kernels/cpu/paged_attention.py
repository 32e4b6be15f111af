"""Attention of new tokens over a paged KV cache.

Pages of one layer (engine/scheduling/kv_blocks.py assigns them to rows):
    keys   [blocks, kv_heads, head_dim, BLOCK]   transposed: a block's 16 scores are one vector
    values [blocks, kv_heads, BLOCK, head_dim]
A row with one new token (decode) reads its pages in place; a row with many (prefill) gathers its past
once and goes through torch's blocked SDPA, where the work is in GEMMs.

Every path honours `scale`, `window` (a token sees itself and window-1 before it; 0 = all) and `softcap`
(Gemma 2: cap * tanh(score / cap)).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.kernels.cpu.openmp import AVAILABLE, arguments, require

BLOCK = 16
SINGLE_THREAD_MAX_ELEMENTS = 1 << 13  # one thread writes fewer in less time than waking the others takes


@dataclass(frozen=True)
class AttentionOptions:
    """How a layer computes attention from its scores q k."""

    scale: float
    window: int = 0
    softcap: float = 0.0


if AVAILABLE:
    from server.kernels.cpu.openmp import floats, ints, kernel, num_threads, thread_num

    @kernel
    def _write_pages(args):  # type: ignore[no-untyped-def]
        count, kv_heads, dim = args[0], args[1], args[2]
        places = ints(args[7], count)
        thread, threads = thread_num(), num_threads()
        for t in range(count * thread // threads, count * (thread + 1) // threads):
            block, at = places[t] // 16, places[t] % 16
            for h in range(kv_heads):
                page = (block * kv_heads + h) * dim * 64
                keys, values = floats(args[3] + page, dim * 16), floats(args[4] + page, dim * 16)
                k = floats(args[5] + (t * args[8] + h * args[9]) * 4, dim)
                v = floats(args[6] + (t * args[10] + h * args[11]) * 4, dim)
                for d in range(dim):
                    keys[d * 16 + at] = k[d]
                    values[at * dim + d] = v[d]


def write_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    k: torch.Tensor,  # [T, kv_heads, head_dim]
    v: torch.Tensor,
    positions: torch.Tensor,  # int64 [T]: block * BLOCK + offset
) -> None:
    """Write each token's K and V to the pages, at its position.

    Tokens may lie apart, and their heads. Raises ShapeError.
    """
    heads, dim = values.shape[1], values.shape[3]
    require(k.shape == v.shape == (len(positions), heads, dim), "K and V are not what the pages hold")
    plain = keys.device.type == "cpu" and keys.dtype == k.dtype == torch.float32
    if AVAILABLE and plain and k.stride(2) == v.stride(2) == 1:
        count, kv_heads = k.shape[:2]
        pointers = [tensor.data_ptr() for tensor in (keys, values, k, v, positions)]
        strides = (*k.stride()[:2], *v.stride()[:2])
        _write_pages(
            arguments(count, kv_heads, dim, *pointers, *strides),
            parallel=k.numel() > SINGLE_THREAD_MAX_ELEMENTS,
        )
        return
    write_pages_reference(keys, values, k, v, positions)


def write_pages_reference(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
) -> None:
    """Reference implementation of `write_pages`, same arguments."""
    block, offset = positions // BLOCK, positions % BLOCK
    keys[block, :, :, offset] = k
    values[block, :, offset] = v


def gather_pages(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of one row's K and V, both [kv_heads, length, head_dim]; blocks int64: the row's, in order."""
    k = keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
    v = values[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :length]
    return k, v


def prefill_attention(
    q: torch.Tensor,  # [n, heads, head_dim]
    k: torch.Tensor,  # [kv_heads, length, head_dim]
    v: torch.Tensor,
    options: AttentionOptions,
    queries: torch.Tensor | None = None,  # int64 [n]: which of the `length` tokens q has; None: the last n
) -> torch.Tensor:
    """Causal attention of one row's chunk over its whole past: [n, heads, head_dim]."""
    n, length = q.shape[0], k.shape[1]
    query = q.transpose(0, 1)[None]  # [1, heads, n, head_dim]
    plain = queries is None and n == length and not options.softcap and not (0 < options.window < length)
    if plain:
        out = F.scaled_dot_product_attention(
            query, k[None], v[None], is_causal=True, scale=options.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    if queries is None:
        queries = torch.arange(length - n, length, device=q.device)
    mask = causal_mask(queries, length, options.window)
    if not options.softcap:
        out = F.scaled_dot_product_attention(
            query, k[None], v[None], attn_mask=mask, scale=options.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    return capped_attention(query[0], k, v, mask, options).transpose(0, 1)


def causal_mask(queries: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """bool [n, length]: which of `length` tokens the tokens with these indices, int64 [n], may see."""
    past = torch.arange(length, device=queries.device)[None]
    mask = past <= queries[:, None]
    return mask & (past > queries[:, None] - window) if window else mask


def capped_attention(
    q: torch.Tensor,  # [heads, n, head_dim]
    k: torch.Tensor,  # [kv_heads, length, head_dim]
    v: torch.Tensor,
    mask: torch.Tensor,  # bool [n, length]
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention as single operators, because SDPA cannot cap scores: [heads, n, head_dim]."""
    group = q.shape[0] // k.shape[0]
    weights = (q @ k.repeat_interleave(group, 0).transpose(1, 2)) * options.scale
    if options.softcap:
        weights = options.softcap * torch.tanh(weights / options.softcap)
    weights = weights.masked_fill(~mask, float("-inf"))
    return weights.float().softmax(-1).to(v.dtype) @ v.repeat_interleave(group, 0)


def decode_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Reference implementation of `decode_attention`, same arguments: [R, heads, head_dim]."""
    last = lengths - 1
    blocks = tables.gather(1, (last // BLOCK)[:, None])[:, 0]
    write_pages_reference(keys, values, k, v, blocks * BLOCK + last % BLOCK)
    out = torch.empty_like(q)
    for i, length in enumerate(lengths.tolist()):
        past_k, past_v = gather_pages(keys, values, tables[i, : -(-length // BLOCK)], length)
        mask = causal_mask(last[i : i + 1], length, options.window)
        out[i] = capped_attention(q[i][:, None], past_k, past_v, mask, options)[:, 0]
    return out
