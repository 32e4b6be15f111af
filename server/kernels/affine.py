"""y += gain * (y - b) + B (A x) + bias, for rows that each have their own, straight from where they lie.

A step of 16 rows with 16 adapters must read every adapter's bytes once; gathering them into one batched
matrix would read them, write them and read them again. The kernel walks pointers instead. It takes rows
with few tokens (decode); for many tokens of one adapter two GEMMs are faster (adapters/methods/affine.py).

Table row of a (site, slot), int64: addresses of A [r, in], B^T [r, out], gain [out] and bias [out], each 0
if absent, and the rank r. All scalings are folded in.
"""

import numpy as np
import torch

from server.kernels.openmp import AVAILABLE, arguments

MAX_RANK = 1024  # the kernel's scratch; max_lora_rank may not be set above it
COLUMNS = 5  # A, B, gain, bias, rank


if AVAILABLE:
    import numba as nb

    from server.kernels.openmp import floats, ints, kernel, num_threads, thread_num

    @nb.njit(cache=True, fastmath=True, error_model="numpy")
    def shrink(h, x, a, r, n):  # type: ignore[no-untyped-def]
        """h[:r] = A x, four ranks at a time so that x is read once for them."""
        k = 0
        while k + 4 <= r:
            a0 = a[k * n : (k + 1) * n]
            a1 = a[(k + 1) * n : (k + 2) * n]
            a2 = a[(k + 2) * n : (k + 3) * n]
            a3 = a[(k + 3) * n : (k + 4) * n]
            s0 = s1 = s2 = s3 = np.float32(0)
            for c in range(n):
                s0 += a0[c] * x[c]
                s1 += a1[c] * x[c]
                s2 += a2[c] * x[c]
                s3 += a3[c] * x[c]
            h[k] = s0
            h[k + 1] = s1
            h[k + 2] = s2
            h[k + 3] = s3
            k += 4
        while k < r:
            s0 = np.float32(0)
            for c in range(n):
                s0 += a[k * n + c] * x[c]
            h[k] = s0
            k += 1

    @nb.njit(cache=True, fastmath=True, error_model="numpy")
    def expand(y, h, b, r, n):  # type: ignore[no-untyped-def]
        """y += B h, eight ranks at a time so that y is read and written seldom."""
        k = 0
        while k + 8 <= r:
            b0 = b[k * n : (k + 1) * n]
            b1 = b[(k + 1) * n : (k + 2) * n]
            b2 = b[(k + 2) * n : (k + 3) * n]
            b3 = b[(k + 3) * n : (k + 4) * n]
            b4 = b[(k + 4) * n : (k + 5) * n]
            b5 = b[(k + 5) * n : (k + 6) * n]
            b6 = b[(k + 6) * n : (k + 7) * n]
            b7 = b[(k + 7) * n : (k + 8) * n]
            h0, h1, h2, h3 = h[k], h[k + 1], h[k + 2], h[k + 3]
            h4, h5, h6, h7 = h[k + 4], h[k + 5], h[k + 6], h[k + 7]
            for o in range(n):
                y[o] += (h0 * b0[o] + h1 * b1[o] + h2 * b2[o] + h3 * b3[o]) + (
                    h4 * b4[o] + h5 * b5[o] + h6 * b6[o] + h7 * b7[o]
                )
            k += 8
        while k < r:
            h0 = h[k]
            for o in range(n):
                y[o] += h0 * b[k * n + o]
            k += 1

    @kernel
    def _grouped_affine(args):  # type: ignore[no-untyped-def]
        count, fan_in, fan_out, x_stride, y_stride = args[0], args[1], args[2], args[3], args[4]
        tokens = ints(args[7], count)
        slots = ints(args[8], count)
        thread, threads = thread_num(), num_threads()
        h = np.empty(MAX_RANK, np.float32)
        for i in range(count * thread // threads, count * (thread + 1) // threads):
            entry = ints(args[9] + slots[i] * 40, 5)
            rank = entry[4]
            x = floats(args[5] + tokens[i] * x_stride * 4, fan_in)
            y = floats(args[6] + tokens[i] * y_stride * 4, fan_out)
            if entry[2] != 0:
                gain = floats(entry[2], fan_out)
                if args[10] != 0:
                    bias = floats(args[10], fan_out)
                    for o in range(fan_out):
                        y[o] += gain[o] * (y[o] - bias[o])
                else:
                    for o in range(fan_out):
                        y[o] += gain[o] * y[o]
            if rank > 0:
                shrink(h, x, floats(entry[0], rank * fan_in), rank, fan_in)
                expand(y, h, floats(entry[1], rank * fan_out), rank, fan_out)
            if entry[3] != 0:
                added = floats(entry[3], fan_out)
                for o in range(fan_out):
                    y[o] += added[o]


def grouped_affine(
    x: torch.Tensor,  # float32 [T, in], rows contiguous
    y: torch.Tensor,  # float32 [T, out], rows contiguous, changed in place
    tokens: torch.Tensor,  # int64 [n]: which rows of x and y
    slots: torch.Tensor,  # int64 [n]: whose adapter; equal slots side by side stay in the CPU's cache
    table: torch.Tensor,  # int64 [slots, 5]
    base_bias: torch.Tensor | None,  # float32 [out]
    *,
    heavy: bool = True,  # False: nobody has matrices here, and waking the threads would cost more
) -> None:
    """Add each token's adapter at one site. CPU, float32; sees only tokens listed."""
    _grouped_affine(
        arguments(
            tokens.shape[0],
            x.shape[1],
            y.shape[1],
            x.stride(0),
            y.stride(0),
            x.data_ptr(),
            y.data_ptr(),
            tokens.data_ptr(),
            slots.data_ptr(),
            table.data_ptr(),
            0 if base_bias is None else base_bias.data_ptr(),
        ),
        parallel=heavy,
    )
