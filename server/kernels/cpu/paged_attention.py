"""Attention of new tokens over a paged KV cache.

Pages of one layer (see engine/kv.py for who owns which):
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
ALONE = 1 << 13  # elements: to write fewer costs one thread less time than waking the others


@dataclass(frozen=True)
class AttentionOptions:
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
    places: torch.Tensor,  # int64 [T]: block * BLOCK + offset
) -> None:
    """Tokens may lie apart, and their heads. Raises ShapeError."""
    heads, dim = values.shape[1], values.shape[3]
    require(k.shape == v.shape == (len(places), heads, dim), "K and V are not what the pages hold")
    plain = keys.device.type == "cpu" and keys.dtype == k.dtype == torch.float32
    if AVAILABLE and plain and k.stride(2) == v.stride(2) == 1:
        count, kv_heads = k.shape[:2]
        held = [tensor.data_ptr() for tensor in (keys, values, k, v, places)]
        strides = (*k.stride()[:2], *v.stride()[:2])
        _write_pages(arguments(count, kv_heads, dim, *held, *strides), parallel=k.numel() > ALONE)
        return
    write_pages_reference(keys, values, k, v, places)


def write_pages_reference(
    keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor
) -> None:
    """The plain twin of `write_pages`."""
    block, offset = places // BLOCK, places % BLOCK
    keys[block, :, :, offset] = k
    values[block, :, offset] = v


def gather_pages(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [kv_heads, length, head_dim], copied: the past of one row, in order."""
    k = keys[blocks].permute(1, 0, 3, 2).flatten(1, 2)[:, :length]
    v = values[blocks].permute(1, 0, 2, 3).flatten(1, 2)[:, :length]
    return k, v


def prefill_attention(
    q: torch.Tensor,  # [n, heads, head_dim]
    k: torch.Tensor,  # [kv_heads, length, head_dim]
    v: torch.Tensor,
    scores: AttentionOptions,
    at: torch.Tensor | None = None,  # int64 [n]: which of the `length` tokens are asking; None: the last
) -> torch.Tensor:
    """Causal attention of one row's chunk over its whole past: [n, heads, head_dim]."""
    n, length = q.shape[0], k.shape[1]
    query = q.transpose(0, 1)[None]  # [1, heads, n, head_dim]
    plain = at is None and n == length and not scores.softcap and not (0 < scores.window < length)
    if plain:
        out = F.scaled_dot_product_attention(
            query, k[None], v[None], is_causal=True, scale=scores.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    if at is None:
        at = torch.arange(length - n, length, device=q.device)
    mask = causal_mask(at, length, scores.window)
    if not scores.softcap:
        out = F.scaled_dot_product_attention(
            query, k[None], v[None], attn_mask=mask, scale=scores.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    return capped_attention(query[0], k, v, mask, scores).transpose(0, 1)


def causal_mask(at: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """Bool [n, length]: what tokens at these places (int64 [n]) may see of `length` tokens."""
    past = torch.arange(length, device=at.device)[None]
    mask = past <= at[:, None]
    return mask & (past > at[:, None] - window) if window else mask


def capped_attention(
    q: torch.Tensor,  # [heads, n, head_dim]
    k: torch.Tensor,  # [kv_heads, length, head_dim]
    v: torch.Tensor,
    mask: torch.Tensor,  # bool [n, length]
    scores: AttentionOptions,
) -> torch.Tensor:
    """Written out, because SDPA cannot cap scores: [heads, n, head_dim]."""
    group = q.shape[0] // k.shape[0]
    weights = (q @ k.repeat_interleave(group, 0).transpose(1, 2)) * scores.scale
    if scores.softcap:
        weights = scores.softcap * torch.tanh(weights / scores.softcap)
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
    scores: AttentionOptions,
) -> torch.Tensor:
    """The plain twin of `decode_attention`."""
    last = lengths - 1
    blocks = tables.gather(1, (last // BLOCK)[:, None])[:, 0]
    write_pages_reference(keys, values, k, v, blocks * BLOCK + last % BLOCK)
    out = torch.empty_like(q)
    for i, length in enumerate(lengths.tolist()):
        past_k, past_v = gather_pages(keys, values, tables[i, : -(-length // BLOCK)], length)
        mask = causal_mask(last[i : i + 1], length, scores.window)
        out[i] = capped_attention(q[i][:, None], past_k, past_v, mask, scores)[:, 0]
    return out
