"""Decode attention on a CPU: one new token of each row attends over its pages, read in place.

The layout of pages and the options: paged_attention.py.
"""

import numpy as np
import torch

from server.kernels.cpu.openmp import AVAILABLE, arguments, bits_of, empty, require
from server.kernels.cpu.paged_attention import AttentionOptions, decode_attention_reference

if AVAILABLE:
    import numba as nb

    from server.kernels.cpu.decode_attention_tiles import MAX_TILE_HEADS, add_page_values, page_scores
    from server.kernels.cpu.openmp import bits_to_float, floats, ints, kernel, num_threads, thread_num

    @nb.njit(cache=True, fastmath=True, inline="always")
    def exp_of_negative(x):  # type: ignore[no-untyped-def]
        """exp(x) for x <= 0 to 2 ulp, in operations that vectorise (Cephes expf)."""
        x = max(x, np.float32(-87.0))
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        x = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * x + np.float32(1.3981999507e-3)
        p = p * x + np.float32(8.3334519073e-3)
        p = p * x + np.float32(4.1665795894e-2)
        p = p * x + np.float32(1.6666665459e-1)
        p = p * x + np.float32(5.0000001201e-1)
        p = p * x * x + x + np.float32(1.0)
        return p * bits_to_float(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))

    @nb.njit(cache=True, fastmath=True, error_model="numpy")
    def _softmax(p, first, length, softcap):  # type: ignore[no-untyped-def]
        """In place over p[first:length], not normalised; returns 1 / sum."""
        if softcap > 0:
            for t in range(first, length):
                p[t] = softcap * np.tanh(p[t] / softcap)
        top = p[first]
        for t in range(first, length):
            top = max(top, p[t])
        total = np.float32(0)
        for t in range(first, length):
            p[t] = exp_of_negative(p[t] - top)
            total += p[t]
        return np.float32(1) / total

    @nb.njit(cache=True, error_model="numpy")
    def _attend(out, p, between, q, heads, keys, values, table, kv, kv_heads, first, length, dim, softcap):  # type: ignore[no-untyped-def]
        """out [heads, dim] += the attention of q [heads, dim] over tokens [first, length)."""
        page, blocks = dim * 64, (length + 15) // 16
        p_at, apart = p.ctypes.data, between * 4
        for b in range(first // 16, blocks):
            here = keys + (table[b] * kv_heads + kv) * page
            last = b + 1 == blocks
            beyond = values + (table[first // 16] * kv_heads + kv) * page
            following = beyond if last else keys + (table[b + 1] * kv_heads + kv) * page
            page_scores(p_at + b * 64, apart, q.ctypes.data, dim * 4, heads, here, following, dim)
        inverses = np.empty(MAX_TILE_HEADS, np.float32)
        for h in range(heads):
            inverses[h] = _softmax(p[h * between : (h + 1) * between], first, length, softcap)
        for b in range(first // 16, blocks):
            skip = max(first - b * 16, 0)
            here = values + (table[b] * kv_heads + kv) * page
            following = here if b + 1 == blocks else values + (table[b + 1] * kv_heads + kv) * page
            add_page_values(
                out.ctypes.data,
                dim * 4,
                p_at + (b * 16 + skip) * 4,
                apart,
                heads,
                here + skip * dim * 4,
                following,
                min(16, length - b * 16) - skip,
                dim,
            )
        for h in range(heads):
            for d in range(dim):
                out[h * dim + d] *= inverses[h]

    @kernel
    def _decode_attention(args):  # type: ignore[no-untyped-def]
        rows, heads, kv_heads, dim, most, window = args[0], args[1], args[2], args[3], args[4], args[5]
        lengths = ints(args[10], rows)
        scale, softcap = bits_to_float(np.int32(args[11])), bits_to_float(np.int32(args[18]))
        group = heads // kv_heads
        page = dim * 16
        longest = 0
        work = 0
        for r in range(rows):
            longest = max(longest, lengths[r])
            work += lengths[r] * kv_heads
        thread, threads = thread_num(), num_threads()
        low, high = work * thread // threads, work * (thread + 1) // threads
        between = longest + 16  # floats between two heads' scores
        p = np.empty(MAX_TILE_HEADS * between, np.float32)
        scaled = np.empty(MAX_TILE_HEADS * dim, np.float32)
        done = 0
        for task in range(rows * kv_heads):
            r, kv = task // kv_heads, task % kv_heads
            length = lengths[r]
            mine = low <= done < high  # threads share the tokens read equally, not the rows
            done += length
            if not mine:
                continue
            table = ints(args[9] + r * most * 8, most)
            first = max(0, length - window) if window > 0 else 0
            last = (table[(length - 1) // 16] * kv_heads + kv) * page  # the new token's own page
            at = (length - 1) % 16
            new_k = floats(args[13] + (r * args[16] + kv * dim) * 4, dim)
            new_v = floats(args[14] + (r * args[17] + kv * dim) * 4, dim)
            keys = floats(args[7] + last * 4, page)
            values = floats(args[8] + last * 4, page)
            for d in range(dim):
                keys[d * 16 + at] = new_k[d]
                values[at * dim + d] = new_v[d]
            for head in range(kv * group, (kv + 1) * group, MAX_TILE_HEADS):
                heard = min(MAX_TILE_HEADS, (kv + 1) * group - head)
                q = floats(args[6] + (r * args[15] + head * dim) * 4, heard * dim)
                out = floats(args[12] + (r * heads + head) * dim * 4, heard * dim)
                for d in range(heard * dim):
                    scaled[d] = q[d] * scale
                    out[d] = np.float32(0)
                _attend(
                    out,
                    p,
                    between,
                    scaled,
                    heard,
                    args[7],
                    args[8],
                    table,
                    kv,
                    kv_heads,
                    first,
                    length,
                    dim,
                    softcap,
                )


def decode_attention(
    q: torch.Tensor,  # [R, heads, head_dim]: one new token a row
    k: torch.Tensor,  # [R, kv_heads, head_dim]: its key, written to its page here
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,  # int64 [R, most blocks]
    lengths: torch.Tensor,  # int64 [R], the new token included
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of each row's new token over its past and itself: [R, heads, head_dim].

    keys and values are pages. Rows of q, k and v may lie apart, their heads may not. Raises ShapeError.
    """
    rows, heads, dim = q.shape
    expected = (rows, keys.shape[1], keys.shape[2])
    fits = k.shape == v.shape == expected and heads % keys.shape[1] == 0 and dim == keys.shape[2]
    require(fits, "K and V fit no page")
    require(len(tables) == len(lengths) == rows, "rows without a table of blocks")
    if not supports_pages(keys):
        return decode_attention_reference(q, k, v, keys, values, tables, lengths, options)
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    out = empty(q, *q.shape)
    scale, softcap = bits_of(options.scale), bits_of(options.softcap)
    sizes = (rows, heads, keys.shape[1], dim, tables.shape[1], options.window)
    pointers = [tensor.data_ptr() for tensor in (q, keys, values, tables, lengths, out, k, v)]
    strides = (q.stride(0), k.stride(0), v.stride(0), softcap)
    _decode_attention(arguments(*sizes, *pointers[:5], scale, *pointers[5:], *strides))
    return out


def supports_pages(pages: torch.Tensor) -> bool:
    """Whether the kernel can read these keys [blocks, kv_heads, head_dim, BLOCK] in place."""
    plain = pages.device.type == "cpu" and pages.dtype == torch.float32
    return AVAILABLE and plain and pages.shape[2] % 8 == 0


def _by_head(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
