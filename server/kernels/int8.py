"""y = x W^T + b for a weight kept as int8: a quarter of the bytes to read, and integer products.

Quantized by output: w = scale[out] * q with q in -127..127, which is all the error there is to speak of. An
input row becomes 16-bit integers by its own largest value, as fine as 32-bit sums allow (13 bits at 1536
inputs): rows with outliers lose nothing, and no row's result depends on another's. Sums are exact, so it is
the same bit for bit alone and in any batch.

Panels of 16 outputs, inputs in pairs: [panels, pairs, 16, 2]. One multiply-add takes a pair for 16 outputs.
"""

import torch
import torch.nn.functional as F

from server.kernels.linear import BY_ROWS, GROUP, LANES, PackedLinear
from server.kernels.openmp import AVAILABLE, Arguments

CHUNK = 96  # rows that a thread quantizes at a time: they stay in its own cache
TOP = 127  # of a weight
MAX_SUM = (1 << 31) - 1
ROUNDED = 2.0**-8  # of a number in bfloat16, the most that it is off by


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [out, in], float32 scales [out]): symmetric, by output."""
    scales = (weight.abs().amax(1) / TOP).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def stands_for(held: torch.Tensor, weight: torch.Tensor) -> bool:
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

    from server.kernels.linear import MANY, MOST, TILES, tile_for
    from server.kernels.openmp import floats, kernel, num_threads, thread_num
    from server.kernels.tiles import Int8, tile

    R0, R1, R2, R3, R4, R5 = TILES
    _t0, _t1, _t2, _t3, _t4, _t5 = (tile(rows, panels, Int8()) for rows, panels in TILES.items())

    @nb.njit(cache=True, error_model="numpy")
    def _run_tile(rows, w, x, out, pairs, panel_bytes):  # type: ignore[no-untyped-def]
        if rows == R0:
            _t0(w, x, out, pairs, panel_bytes)
        elif rows == R1:
            _t1(w, x, out, pairs, panel_bytes)
        elif rows == R2:
            _t2(w, x, out, pairs, panel_bytes)
        elif rows == R3:
            _t3(w, x, out, pairs, panel_bytes)
        elif rows == R4:
            _t4(w, x, out, pairs, panel_bytes)
        else:
            _t5(w, x, out, pairs, panel_bytes)

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
    def _lay_out(beside, steps, x, stride, first, end, depth, most):  # type: ignore[no-untyped-def]
        """Rows [first, end) of x as blocks [pairs, rows of a tile, 2]. The last row fills a block up."""
        at, start, pairs = first, 0, (depth + 1) // 2
        while at < end:
            rows, _ = tile_for(end - at)
            for r in range(rows):
                row = floats(x + min(at + r, end - 1) * stride * 4, depth)
                step = _quantize_row(beside[start + r * 2 :], rows, row, depth, most)
                if at + r < end:
                    steps[at + r - first] = step
            start += rows * pairs * 2
            at += rows

    @nb.njit(cache=True, error_model="numpy", fastmath=True)
    def _write(y, y_stride, out, width, count, last, steps, scales, bias):  # type: ignore[no-untyped-def]
        """`count` rows of `last` sums each, from out [rows, width], scaled back, plus the bias."""
        by_output = floats(scales, last)
        for r in range(count):
            target, step = floats(y + r * y_stride * 4, last), steps[r]
            if bias != 0:
                added = floats(bias, last)
                for j in range(last):
                    target[j] = np.float32(out[r * width + j]) * (step * by_output[j]) + added[j]
            else:
                for j in range(last):
                    target[j] = np.float32(out[r * width + j]) * (step * by_output[j])

    @nb.njit(cache=True, error_model="numpy")
    def _multiply(x, x_stride, y, y_stride, w, scales, bias, depth, n, most, first, end, low, high):  # type: ignore[no-untyped-def]
        """Rows [first, end) times the outputs of groups [low, high)."""
        pairs = (depth + 1) // 2
        beside = np.empty((end - first + MOST) * pairs * 2, np.int16)
        steps = np.empty(end - first, np.float32)
        out = np.empty(MOST * GROUP * LANES, np.int32)
        _lay_out(beside, steps, x, x_stride, first, end, depth, most)
        panel_bytes = pairs * 2 * LANES
        at, start = first, 0
        while at < end:
            rows, panels = tile_for(end - at)
            whole = max(1, (end - at - MOST + rows - 1) // rows)
            width = panels * LANES
            for column in range(low * GROUP * LANES, min(high * GROUP * LANES, n), width):
                weight, last = w + column // LANES * panel_bytes, min(width, n - column)
                added = 0 if bias == 0 else bias + column * 4
                for block in range(whole):
                    done = at + block * rows
                    laid = beside.ctypes.data + (start + block * rows * pairs * 2) * 2
                    _run_tile(rows, weight, laid, out.ctypes.data, pairs, panel_bytes)
                    _write(
                        y + (done * y_stride + column) * 4,
                        y_stride,
                        out,
                        width,
                        min(rows, end - done),
                        last,
                        steps[done - first :],
                        scales + column * 4,
                        added,
                    )
            start += whole * rows * pairs * 2
            at += whole * rows

    @kernel
    def _linear(args):  # type: ignore[no-untyped-def]
        depth, n, most, w, scales, bias = args[0], args[1], args[2], args[3], args[4], args[5]
        rows, x, x_stride, y, y_stride = args[6], args[7], args[8], args[9], args[10]
        groups = (n + GROUP * LANES - 1) // (GROUP * LANES)
        thread, threads = thread_num(), num_threads()
        if rows < BY_ROWS:
            low, high = groups * thread // threads, groups * (thread + 1) // threads
            _multiply(x, x_stride, y, y_stride, w, scales, bias, depth, n, most, 0, rows, low, high)
            return
        blocks = (rows + MANY - 1) // MANY
        first, end = blocks * thread // threads * MANY, min(blocks * (thread + 1) // threads * MANY, rows)
        for at in range(first, end, CHUNK):
            last = min(at + CHUNK, end)
            _multiply(x, x_stride, y, y_stride, w, scales, bias, depth, n, most, at, last, 0, groups)


class Int8Linear(PackedLinear):
    """The same for a weight that becomes int8. Its parts are panels, and scales by panel [panels, 16]."""

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> "Int8Linear":
        outputs, inputs = weight.shape
        quantized, scales = quantize(weight)
        panels = pack(quantized)
        padded = F.pad(scales, (0, len(panels) * LANES - outputs))
        return cls((panels, padded.view(-1, LANES)), inputs, outputs, bias)

    def weight(self) -> torch.Tensor:
        """[out, in]: what the int8 stand for."""
        panels, scales = self.parts
        return unpack(panels, self.outputs, self.inputs) * scales.flatten()[: self.outputs, None]

    def _sizes(self) -> tuple[int, ...]:
        return self.inputs, self.outputs, finest(self.inputs)

    def _launch(self, args: Arguments) -> None:
        _linear(args)
