"""y = x W^T + b for a weight kept as int8: a quarter of the bytes to read, and integer products.

Quantized by output: w = scale[out] * q with q in -127..127, which is all the error there is to speak of. An
input row becomes 16-bit integers by its own largest value, as fine as 32-bit sums allow (13 bits at 1536
inputs): rows with outliers lose nothing, and no row's result depends on another's. Sums are exact, so it is
the same bit for bit alone and in any batch.

Panels of 16 outputs, inputs in pairs: [panels, pairs, 16, 2]. One multiply-add takes a pair for 16 outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.openmp import AVAILABLE, Arguments
from server.kernels.cpu.packed_linear import AHEAD, CHUNK, GROUP, LANES, PackedLinear

TOP = 127  # of a weight, and of an input of 8 bits; for these (vnni_linear.py):
INPUTS = 64  # of a group, whose largest decides how fine it is
SMALLEST = 1e-30  # a largest that is not zero
OFFSET = 128  # of weights that are held without a sign
MAX_SUM = (1 << 31) - 1
ROUNDED = 2.0**-8  # of a number in bfloat16, the most that it is off by


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [out, in], float32 scales [out]): symmetric, by output."""
    scales = (weight.abs().amax(1) / TOP).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def is_dequantised(held: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `held`, what int8 made of a weight [out, in], may come of this one, which may be rounded."""
    step = held.abs().amax(1, keepdim=True) / TOP
    return bool(((weight.float() - held).abs() <= 0.51 * step + held.abs() * ROUNDED).all())


def pack(quantized: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] as panels [out / 16, in / 2, 16, 2], with zeros up to a multiple of 64 outputs."""
    outputs, inputs = quantized.shape
    padded = -(-outputs // (LANES * GROUP)) * LANES * GROUP
    whole = F.pad(quantized, (0, inputs % 2, 0, padded - outputs))
    return whole.view(padded // LANES, LANES, -1, 2).transpose(1, 2).contiguous()


def unpack(panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """int8 [out, in] again."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * LANES, -1)[:outputs, :inputs].contiguous()


def finest(inputs: int) -> int:
    """The largest an input may become without a sum that 32 bits cannot hold."""
    return min(32767, MAX_SUM // (TOP * inputs))


def int8_linear_reference(
    x: torch.Tensor, quantized: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The plain twin of `Int8Linear`."""
    steps = x.abs().amax(1, keepdim=True) / finest(x.shape[1])
    whole = (x / steps.clamp(min=torch.finfo(torch.float32).tiny)).round()
    y = (whole.double() @ quantized.double().T).float() * (steps * scales)
    return y if bias is None else y + bias


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.fused_bias import add_biases  # compiled in: numba sees only changes of this file
    from server.kernels.cpu.llvm_tiles import Int8, tile
    from server.kernels.cpu.openmp import barrier, floats, kernel, num_threads, shorts, thread_num, words
    from server.kernels.cpu.packed_linear import SHARE, TILES, ask_for, tiles_for

    OWN = 12  # where a launch's arguments tell of tokens' own biases
    R0, R1, R2, R3, R4 = TILES
    _t0, _t1, _t2, _t3, _t4 = (tile(rows, panels, Int8()) for rows, panels in TILES.items())
    _h0, _h1, _h2 = (tile(rows, min(panels, SHARE), Int8()) for rows, panels in [*TILES.items()][:3])

    @nb.njit(cache=True, error_model="numpy")
    def _run_tile(rows, half, w, x, out, pairs, panel_bytes, later, pace):  # type: ignore[no-untyped-def]
        if rows == R0:
            if half:
                _h0(w, x, out, pairs, panel_bytes, later, pace)
            else:
                _t0(w, x, out, pairs, panel_bytes, later, pace)
        elif rows == R1:
            if half:
                _h1(w, x, out, pairs, panel_bytes, later, pace)
            else:
                _t1(w, x, out, pairs, panel_bytes, later, pace)
        elif rows == R2:
            if half:
                _h2(w, x, out, pairs, panel_bytes, later, pace)
            else:
                _t2(w, x, out, pairs, panel_bytes, later, pace)
        elif rows == R3:
            _t3(w, x, out, pairs, panel_bytes, later, pace)
        else:
            _t4(w, x, out, pairs, panel_bytes, later, pace)

    @nb.njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})  # NaN must stay NaN
    def _quantize_row(target, rows, x, depth, most):  # type: ignore[no-untyped-def]
        """x [depth] as pairs that lie `rows` apart; what 1 stands for, or NaN if x is not finite."""
        top, wrong = np.float32(0), np.float32(0)
        for k in range(depth):
            top = max(top, abs(x[k]))
            wrong += x[k] * np.float32(0)
        if top == 0 or wrong != 0:
            top = np.float32(1)
        factor = np.float32(most) / top
        for k in range(depth // 2):
            target[k * rows * 2] = np.int16(np.rint(x[2 * k] * factor))
            target[k * rows * 2 + 1] = np.int16(np.rint(x[2 * k + 1] * factor))
        if depth % 2:
            target[depth // 2 * rows * 2] = np.int16(np.rint(x[depth - 1] * factor))
            target[depth // 2 * rows * 2 + 1] = np.int16(0)
        return top / np.float32(most) + wrong

    @nb.njit(cache=True, error_model="numpy")
    def _lay_out(laid, steps, x, stride, first, end, depth, most, rows, low, high):  # type: ignore[no-untyped-def]
        """Of rows from `first` on those in [low, high), in blocks [pairs, rows of a tile, 2].

        Those from `end` on, which fill a block up, repeat the last.
        """
        pairs = (depth + 1) // 2
        for i in range(low, high):
            block = shorts(laid + i // rows * rows * pairs * 4, rows * pairs * 2)
            row = floats(x + min(first + i, end - 1) * stride * 4, depth)
            steps[i] = _quantize_row(block[i % rows * 2 :], rows, row, depth, most)

    @nb.njit(cache=True, error_model="numpy", fastmath=False)  # see kernel: the same bits wherever a row lies
    def _write(y, y_stride, out, width, count, last, steps, scales, bias):  # type: ignore[no-untyped-def]
        """`count` rows of `last` sums each, from out [rows, width], scaled back, plus the bias."""
        by_output = floats(scales, last)
        for r in range(count):
            target, step = floats(y + r * y_stride * 4, last), steps[r]
            sums = words(out + r * width * 4, last)
            if bias != 0:
                added = floats(bias, last)
                for j in range(last):
                    target[j] = np.float32(sums[j]) * (step * by_output[j]) + added[j]
            else:
                for j in range(last):
                    target[j] = np.float32(sums[j]) * (step * by_output[j])

    @nb.njit(cache=True, error_model="numpy")
    def _multiply(  # type: ignore[no-untyped-def]
        laid, steps, y, y_stride, w, scales, bias, depth, n, first, end, rows, panels, tiles, low, high, args
    ):
        """Rows [first, end), as they are laid out, times panels [low, high)."""
        pairs = (depth + 1) // 2
        out = np.empty(rows * panels * LANES, np.int32)
        panel_bytes = pairs * 2 * LANES
        p = low
        while p < high and p * LANES < n:
            here = panels if p + panels <= high else SHARE
            width, column = here * LANES, p * LANES
            added, own = 0 if bias == 0 else bias + column * 4, w + p * panel_bytes
            last = min(width, n - column)
            if args[OWN] != 0:
                add_biases(y, y_stride, first, end - first, column, last, args, OWN, False)
            for block in range(tiles):
                done = first + block * rows
                x = laid + block * rows * pairs * 4
                later = (
                    own + AHEAD if tiles == 1 else own + (here * pairs + block * (pairs // tiles)) * 2 * LANES
                )
                target, some = y + (done * y_stride + column) * 4, min(rows, end - done)
                ask_for(target, y_stride, some, last)
                _run_tile(
                    rows,
                    here < panels,
                    own,
                    x,
                    out.ctypes.data,
                    pairs,
                    panel_bytes,
                    later,
                    2 * LANES // tiles,
                )
                by_row, by_output = steps[block * rows :], scales + column * 4
                _write(target, y_stride, out.ctypes.data, width, some, last, by_row, by_output, added)
                if args[OWN] != 0:
                    add_biases(target, y_stride, done, some, column, last, args, OWN, True)
            p += here

    @kernel
    def _linear(args):  # type: ignore[no-untyped-def]
        depth, n, laid, most, w, scales, bias = args[0], args[1], args[2], args[3], args[4], args[5], args[6]
        count, x, x_stride, y, y_stride = args[7], args[8], args[9], args[10], args[11]
        shares = (n + SHARE * LANES - 1) // (SHARE * LANES)
        thread, threads = thread_num(), num_threads()
        low, high = shares * thread // threads * SHARE, shares * (thread + 1) // threads * SHARE
        pieces = (count + CHUNK - 1) // CHUNK  # of about the same size: each reads the whole weight
        for piece in range(pieces):
            first, end = count * piece // pieces, count * (piece + 1) // pieces
            rows, panels, tiles = tiles_for(end - first)
            total = rows * tiles
            steps = floats(laid, total)
            blocks = laid + total * 4
            if first > 0:
                barrier()
            mine = (total * thread // threads, total * (thread + 1) // threads)
            _lay_out(blocks, steps, x, x_stride, first, end, depth, most, rows, mine[0], mine[1])
            barrier()
            _multiply(
                blocks,
                steps,
                y,
                y_stride,
                w,
                scales,
                bias,
                depth,
                n,
                first,
                end,
                rows,
                panels,
                tiles,
                low,
                high,
                args,
            )


class Int8Linear(PackedLinear):
    """The same for a weight that becomes int8. Its parts are panels, and scales by panel [panels, 16]."""

    exact = False  # see unrounded

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> "Int8Linear":
        outputs, inputs = weight.shape
        quantized, scales = quantize(weight)
        panels = cls.packed(quantized)
        padded = F.pad(scales, (0, len(panels) * LANES - outputs))
        return cls((panels, padded.view(-1, LANES)), inputs, outputs, bias)

    @staticmethod
    def packed(quantized: torch.Tensor) -> torch.Tensor:
        """int8 [out, in] as the kernel reads it."""
        return pack(quantized)

    @staticmethod
    def unpacked(panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
        """int8 [out, in] again."""
        return unpack(panels, outputs, inputs)

    def weight(self) -> torch.Tensor:
        """[out, in]: what the int8 stand for."""
        panels, scales = self.parts
        return self.unpacked(panels, self.outputs, self.inputs) * scales.flatten()[: self.outputs, None]

    def __call__(self, x: torch.Tensor, own: Biases | None = None) -> torch.Tensor:
        if Int8Linear.exact:
            assert own is None, "for trials of the base"
            return F.linear(x, self.weight(), self.bias)
        return super().__call__(x, own)

    def _sizes(self) -> tuple[int, ...]:
        return *super()._sizes(), finest(self.inputs)

    def _launch(self, args: Arguments) -> None:
        _linear(args)


@contextmanager
def without_rounding() -> Iterator[None]:
    """Inputs as they are: the last bit of a norm becomes the next integer otherwise, which hides what a trial
    of something else looks for.
    """
    Int8Linear.exact = True
    try:
        yield
    finally:
        Int8Linear.exact = False
