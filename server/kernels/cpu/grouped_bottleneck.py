"""Bottleneck adapters: h += U act(D x + d) + u, where each token uses its own adapter's weights.

x is h, the output of attention or MLP; or r, the residual before it; or their sum. With an epsilon, x is
divided by its root mean square first. The kernel reads weights through a table of addresses, as
grouped_affine.py does: copying them into one tensor would cost more than the product. It is for rows with few
tokens; for many tokens of one adapter two GEMMs are faster (bottleneck_bank.py).

Table row of a (site, slot), int64: addresses of D [b, n], d [b], U^T [b, n] and u [n], all scalings folded
in, then the width b, the non-linearity, the input, and epsilon as the bits of a float32 (0: no norm).
Width 0: nothing to do.
"""

import numpy as np
import torch

from server.kernels.cpu.openmp import AVAILABLE, arguments, require
from server.kernels.limits import MAX_WIDTH

COLUMNS = 8  # D, d, U, u, width, non-linearity, input, epsilon
NON_LINEARITIES = ("linear", "relu", "leakyrelu", "tanh", "silu", "gelu", "gelu_new")
INPUTS = ("output", "residual", "sum")  # h, r, r + h


if AVAILABLE:
    from math import erf, sqrt

    import numba as nb

    from server.kernels.cpu.low_rank_tiles import expand, shrink
    from server.kernels.cpu.openmp import bits_to_float, floats, ints, kernel, num_threads, thread_num

    @nb.njit(cache=True, fastmath=True, error_model="numpy")
    def _activate(z, count, kind):  # type: ignore[no-untyped-def]
        """Apply a non-linearity to z [count] in place; `kind` is an index of NON_LINEARITIES."""
        half, one = np.float32(0.5), np.float32(1)
        if kind == 1 or kind == 2:
            slope = np.float32(0) if kind == 1 else np.float32(0.01)
            for k in range(count):
                z[k] = slope * z[k] if z[k] < 0 else z[k]
        elif kind == 3:
            for k in range(count):
                z[k] = np.tanh(z[k])
        elif kind == 4:
            for k in range(count):  # float32 exp overflows above 88, and fastmath assumes no infinities
                z[k] = z[k] / (one + np.exp(min(-z[k], np.float32(80))))
        elif kind == 5:
            for k in range(count):
                z[k] = half * z[k] * (one + np.float32(erf(z[k] * np.float32(0.70710678))))
        elif kind == 6:
            for k in range(count):
                inner = np.float32(0.79788456) * (z[k] + np.float32(0.044715) * z[k] * z[k] * z[k])
                z[k] = half * z[k] * (one + np.tanh(inner))

    @kernel
    def _grouped_bottleneck(args):  # type: ignore[no-untyped-def]
        count, n, h_stride, r_stride = args[0], args[1], args[2], args[3]
        tokens = ints(args[6], count)
        slots = ints(args[7], count)
        thread, threads = thread_num(), num_threads()
        z = np.empty(MAX_WIDTH, np.float32)
        total = np.empty(n, np.float32)
        for i in range(count * thread // threads, count * (thread + 1) // threads):
            entry = ints(args[8] + slots[i] * args[9] * 8, 8)
            width = entry[4]
            if width == 0:
                continue
            h = floats(args[4] + tokens[i] * h_stride * 4, n)
            r = floats(args[5] + tokens[i] * r_stride * 4, n)
            x = h
            if entry[6] == 1:
                x = r
            elif entry[6] == 2:
                for o in range(n):
                    total[o] = h[o] + r[o]
                x = total
            z_at, x_at = z.ctypes.data, x.ctypes.data
            shrink(z_at, 0, x_at, x_at, x_at, x_at, 1, entry[0], width, n, 4)
            if entry[7] != 0:
                squares = np.float32(0)
                for o in range(n):
                    squares += x[o] * x[o]
                scale = np.float32(1 / sqrt(squares / n + bits_to_float(np.int32(entry[7]))))
                for k in range(width):
                    z[k] *= scale
            bias = floats(entry[1], width)
            for k in range(width):
                z[k] += bias[k]
            _activate(z, width, entry[5])
            h_at = h.ctypes.data
            expand(h_at, h_at, h_at, h_at, 1, z_at, 0, entry[2], width, n, 4)
            added = floats(entry[3], n)
            for o in range(n):
                h[o] += added[o]


def grouped_bottleneck(
    h: torch.Tensor,  # float32 [T, n], rows contiguous, changed in place
    r: torch.Tensor,  # float32 [T, n], rows contiguous
    tokens: torch.Tensor,  # int64 [k]: which rows of h and r
    slots: torch.Tensor,  # int64 [k]: each token's slot; sorted, adapters stay in the CPU's cache
    table: torch.Tensor,  # int64 [slots, 8], rows contiguous
) -> None:
    """Add each listed token's adapter to h, at one site. CPU, float32. Raises ShapeError."""
    require(h.shape == r.shape, "a residual of other tokens")
    pointers = (tensor.data_ptr() for tensor in (h, r, tokens, slots, table))
    sizes = (tokens.shape[0], h.shape[1], h.stride(0), r.stride(0))
    _grouped_bottleneck(arguments(*sizes, *pointers, table.stride(0)))
