"""Gradients of the operations between the linears of a Llama-like layer, in one pass each (llama_ops.py).

Only inputs have gradients: no weight here is trained. The gradient of the rotary embedding is the inverse
rotation, `rotate_` with the sine negated.
"""

import torch

from server.kernels.cpu.llama_ops import SINGLE_THREAD_MAX_ELEMENTS, RmsNorm
from server.kernels.cpu.openmp import AVAILABLE, arguments

if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.decode_attention import exp_of_negative
    from server.kernels.cpu.llama_ops import MATH
    from server.kernels.cpu.openmp import floats, kernel, num_threads, thread_num

    @nb.njit(cache=True, error_model="numpy", fastmath=MATH)
    def _norm_row(found, upon, x, weight, n, epsilon):  # type: ignore[no-untyped-def]
        squares, along = np.float32(0), np.float32(0)
        for i in range(n):
            squares += x[i] * x[i]
            along += weight[i] * upon[i] * x[i]
        factor = np.float32(1) / np.sqrt(squares / np.float32(n) + epsilon)
        share = along * factor * factor / np.float32(n)
        for i in range(n):
            found[i] = factor * (weight[i] * upon[i] - x[i] * share)

    @kernel
    def _norm(args):  # type: ignore[no-untyped-def]
        count, n = args[0], args[1]
        weight, epsilon = floats(args[2], n), floats(args[3], 1)[0]
        thread, threads = thread_num(), num_threads()
        for t in range(count * thread // threads, count * (thread + 1) // threads):
            at = t * n * 4
            found = floats(args[6] + at, n)
            _norm_row(found, floats(args[5] + at, n), floats(args[4] + at, n), weight, n, epsilon)
            if args[7] != 0:
                more = floats(args[7] + at, n)
                for i in range(n):
                    found[i] += more[i]

    @nb.njit(cache=True, error_model="numpy", fastmath=MATH)
    def _silu_times_piece(of_gate, of_up, upon, gate, up, n):  # type: ignore[no-untyped-def]
        for i in range(n):
            g = gate[i]
            e = exp_of_negative(-abs(g))
            share = (np.float32(1) if g >= 0 else e) / (np.float32(1) + e)
            of_up[i] = upon[i] * g * share
            of_gate[i] = upon[i] * up[i] * share * (np.float32(1) + g * (np.float32(1) - share))

    @kernel
    def _silu_times(args):  # type: ignore[no-untyped-def]
        thread, threads = thread_num(), num_threads()
        first, end = args[0] * thread // threads, args[0] * (thread + 1) // threads
        n, at = end - first, first * 4
        gate, up, upon = floats(args[1] + at, n), floats(args[2] + at, n), floats(args[3] + at, n)
        _silu_times_piece(floats(args[4] + at, n), floats(args[5] + at, n), upon, gate, up, n)


def norm_gradient(
    norm: RmsNorm, x: torch.Tensor, upon: torch.Tensor, more: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of x, given `upon`, that of norm(x); plus `more`. All [T, n] and contiguous."""
    gradient = torch.empty_like(x)
    tensors = (norm.weight, norm.epsilon, x, upon, gradient)
    pointers = [tensor.data_ptr() for tensor in tensors]
    also = 0 if more is None else more.data_ptr()
    _norm(arguments(*x.shape, *pointers, also), parallel=x.numel() > SINGLE_THREAD_MAX_ELEMENTS)
    return gradient


def silu_times_gradients(
    gate: torch.Tensor, up: torch.Tensor, upon: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, given `upon`, that of silu(gate) * up. All [T, n] and contiguous."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    pointers = [tensor.data_ptr() for tensor in (gate, up, upon, of_gate, of_up)]
    _silu_times(arguments(gate.numel(), *pointers), parallel=4 * gate.numel() > SINGLE_THREAD_MAX_ELEMENTS)
    return of_gate, of_up
