"""The operations between the linears of a Llama-like layer, one pass each: norm, rotary embedding, SiLU, sum.

They are small, and several operators each in torch: at 16 rows those calls took longer than the linears'
arithmetic. A token's result depends on that token only: it is the same bit for bit in any batch.

RMSNorm: arXiv 1910.07467. Rotary embedding, in halves: arXiv 2104.09864. SwiGLU: arXiv 2002.05202.
"""

import torch
import torch.nn.functional as F

from server.kernels.cpu.fused_bias import NO_BIASES, Biases
from server.kernels.cpu.openmp import AVAILABLE, arguments, empty, require

SINGLE_THREAD_MAX_ELEMENTS = 1 << 15  # one thread takes less time for fewer than waking the others takes


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Reference implementation of RmsNorm: [..., n] of x [..., n] and weight [n]."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Reference implementation of `rotate_`, not in place: [T, heads, dim] of x; cos and sin [T, dim]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def silu_times_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Reference implementation of `silu_times`: [T, n] of gate and up [T, n]."""
    return F.silu(gate) * up


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.decode_attention import exp_of_negative
    from server.kernels.cpu.fused_bias import add_biases  # compiled in: numba sees only changes of this file
    from server.kernels.cpu.openmp import floats, kernel, num_threads, thread_num

    # reordered sums, but NaN must stay NaN
    MATH = {"reassoc", "contract", "arcp", "nsz"}

    @nb.njit(cache=True, error_model="numpy", fastmath=MATH)
    def _norm(y, x, weight, n, epsilon):  # type: ignore[no-untyped-def]
        total = np.float32(0)
        for i in range(n):
            total += x[i] * x[i]
        factor = np.float32(1) / np.sqrt(total / np.float32(n) + epsilon)
        for i in range(n):
            y[i] = weight[i] * (x[i] * factor)

    @kernel
    def _rms_norm(args):  # type: ignore[no-untyped-def]
        count, n = args[0], args[1]
        weight, epsilon = floats(args[2], n), floats(args[3], 1)[0]
        thread, threads = thread_num(), num_threads()
        for t in range(count * thread // threads, count * (thread + 1) // threads):
            x, y = floats(args[4] + t * n * 4, n), floats(args[5] + t * n * 4, n)
            if args[6] != 0:
                added, total = floats(args[6] + t * n * 4, n), floats(args[7] + t * n * 4, n)
                for i in range(n):
                    total[i] = x[i] + added[i]
                _norm(y, total, weight, n, epsilon)
            else:
                _norm(y, x, weight, n, epsilon)
            if args[8] != 0:
                add_biases(args[5] + t * n * 4, n, t, 1, 0, n, args, 8, True)

    @kernel
    def _rotate(args):  # type: ignore[no-untyped-def]
        count, heads, dim, stride = args[0], args[1], args[2], args[3]
        thread, threads = thread_num(), num_threads()
        half = dim // 2
        for t in range(count * thread // threads, count * (thread + 1) // threads):
            cos, sin = floats(args[5] + t * dim * 4, dim), floats(args[6] + t * dim * 4, dim)
            for h in range(heads):
                x = floats(args[4] + (t * stride + h * dim) * 4, dim)
                if args[7] != 0:
                    _norm(x, x, floats(args[7], dim), dim, floats(args[8], 1)[0])
                for d in range(half):
                    first, second = x[d], x[d + half]
                    x[d] = first * cos[d] - second * sin[d]
                    x[d + half] = second * cos[d + half] + first * sin[d + half]

    @nb.njit(cache=True, error_model="numpy", fastmath=MATH)
    def _silu_times_row(y, gate, up, n):  # type: ignore[no-untyped-def]
        for i in range(n):
            g = gate[i]
            e = exp_of_negative(-abs(g))
            share = (np.float32(1) if g >= 0 else e) / (np.float32(1) + e)
            y[i] = g * share * up[i]

    @kernel
    def _silu_times(args):  # type: ignore[no-untyped-def]
        count, n, stride = args[0], args[1], args[2]
        thread, threads = thread_num(), num_threads()
        for t in range(count * thread // threads, count * (thread + 1) // threads):
            gate, up = floats(args[3] + t * stride * 4, n), floats(args[4] + t * stride * 4, n)
            _silu_times_row(floats(args[5] + t * n * 4, n), gate, up, n)

    @kernel
    def _add(args):  # type: ignore[no-untyped-def]
        thread, threads = thread_num(), num_threads()
        first, end = args[0] * thread // threads, args[0] * (thread + 1) // threads
        y, x = floats(args[1] + first * 4, end - first), floats(args[2] + first * 4, end - first)
        for i in range(end - first):
            y[i] += x[i]


class RmsNorm:
    """An RMSNorm with weight [n]. CPU, float32."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight, torch.tensor([epsilon], dtype=torch.float32)

    def __call__(self, x: torch.Tensor, biases: Biases | None = None) -> torch.Tensor:
        """The norm [T, n] of x [T, n], contiguous, plus each token's own biases. Raises ShapeError."""
        y = empty(x, *x.shape)
        self._launch(x, y, 0, 0, biases)
        return y

    def of_sum(
        self, x: torch.Tensor, added: torch.Tensor, biases: Biases | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + added, its norm plus each token's biases), all [T, n] and contiguous. Raises ShapeError."""
        total, y = empty(x, *x.shape), empty(x, *x.shape)
        self._launch(x, y, added.data_ptr(), total.data_ptr(), biases)
        return total, y

    def _launch(
        self, x: torch.Tensor, y: torch.Tensor, added: int, total: int, biases: Biases | None
    ) -> None:
        require(x.shape[1:] == self.weight.shape, "the norm is of another width")
        pointers = (self.weight.data_ptr(), self.epsilon.data_ptr(), x.data_ptr(), y.data_ptr(), added, total)
        of_tokens = biases.arguments() if biases else NO_BIASES
        _rms_norm(arguments(*x.shape, *pointers, *of_tokens), parallel=x.numel() > SINGLE_THREAD_MAX_ELEMENTS)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: RmsNorm | None = None) -> None:
    """Rotate x [T, heads, dim] in place, after `norm` of each head if there is one; cos and sin [T, dim].

    Tokens may lie apart, their heads may not. Raises ShapeError.
    """
    count, heads, dim = x.shape
    require(cos.shape == sin.shape == (count, dim), "cosines of other tokens, or of a part of each head")
    of_norm = (0, 0) if norm is None else (norm.weight.data_ptr(), norm.epsilon.data_ptr())
    sizes = (count, heads, dim, x.stride(0))
    pointers = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *of_norm)
    _rotate(arguments(*sizes, *pointers), parallel=x.numel() > SINGLE_THREAD_MAX_ELEMENTS)


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, all [T, n]; gate and up may be columns of one tensor. Raises ShapeError."""
    require(gate.shape == up.shape, "gate and up differ")
    y = empty(gate, *gate.shape)
    sizes = (*gate.shape, gate.stride(0))
    pointers = (gate.data_ptr(), up.data_ptr(), y.data_ptr())
    _silu_times(arguments(*sizes, *pointers), parallel=4 * y.numel() > SINGLE_THREAD_MAX_ELEMENTS)
    return y


def add_(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y += x, both [T, n] and contiguous; returns y. Raises ShapeError."""
    require(y.shape == x.shape, "summands differ")
    _add(arguments(y.numel(), y.data_ptr(), x.data_ptr()), parallel=y.numel() > SINGLE_THREAD_MAX_ELEMENTS)
    return y
