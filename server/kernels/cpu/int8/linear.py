"""y = x W^T + b with a weight in int8: a quarter of float32's bytes to read, and integer products.

Quantized by output: w = scale[out] * q with q in -127..127; nearly all of the error comes from this. An input
row becomes 16-bit integers, scaled by its own largest value as finely as 32-bit sums allow (13 bits at 1536
inputs): rows with outliers lose nothing, and no row's result depends on another's. Sums are exact, so a
result is the same bit for bit alone and in any batch.

Panels of 16 outputs, inputs in pairs: [panels, pairs, 16, 2]. One multiply-add takes a pair for 16 outputs.
"""

from typing import Self

import torch
import torch.nn.functional as F

from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.int8.quantization import max_quantized_input, quantize
from server.kernels.cpu.openmp import AVAILABLE, Arguments
from server.kernels.cpu.packed_linear import (
    CHUNK_ROWS,
    LANES,
    PREFETCH_BYTES,
    PackedLinear,
    padded,
)


def pack(quantized: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] as panels [out / 16, in / 2, 16, 2], padded with zeros to a multiple of 64 outputs."""
    outputs, inputs = quantized.shape
    width = padded(outputs)
    whole = F.pad(quantized, (0, inputs % 2, 0, width - outputs))
    return whole.view(width // LANES, LANES, -1, 2).transpose(1, 2).contiguous()


def unpack(panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The int8 [out, in] that `pack` packed."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * LANES, -1)[:outputs, :inputs].contiguous()


def int8_linear_reference(
    x: torch.Tensor, quantized: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Reference implementation of Int8Linear: [T, out] of x [T, in], quantized [out, in], scales [out]."""
    steps = x.abs().amax(1, keepdim=True) / max_quantized_input(x.shape[1])
    whole = (x / steps.clamp(min=torch.finfo(torch.float32).tiny)).round()
    y = (whole.double() @ quantized.double().T).float() * (steps * scales)
    return y if bias is None else y + bias


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.fused_bias import add_biases  # compiled in: numba sees only changes of this file
    from server.kernels.cpu.llvm_tiles import any_tile, int8_tile
    from server.kernels.cpu.openmp import barrier, floats, kernel, num_threads, shorts, thread_num, words
    from server.kernels.cpu.packed_linear import (
        PANEL_STEP,
        TILE_SIZES,
        panels_of_thread,
        prefetch_outputs,
        tiles_for,
    )

    BIASES_ARG = 12  # index of Biases.arguments() in a launch's arguments
    _tiles = any_tile(int8_tile, TILE_SIZES)

    @nb.njit(cache=True, error_model="numpy")
    def _run_tile(rows, panels, w, x, out, pairs, panel_bytes, later, pace):  # type: ignore[no-untyped-def]
        _tiles(rows, panels, w, x, out, pairs, panel_bytes, later, pace)

    @nb.njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})  # NaN must stay NaN
    def _quantize_row(target, rows, x, depth, limit):  # type: ignore[no-untyped-def]
        """Write x [depth] as pairs of integers, `rows` pairs apart; returns their scale, NaN for such x."""
        top, wrong = np.float32(0), np.float32(0)
        for k in range(depth):
            top = max(top, abs(x[k]))
            wrong += x[k] * np.float32(0)
        if top == 0 or wrong != 0:
            top = np.float32(1)
        factor = np.float32(limit) / top
        for k in range(depth // 2):
            target[k * rows * 2] = np.int16(np.rint(x[2 * k] * factor))
            target[k * rows * 2 + 1] = np.int16(np.rint(x[2 * k + 1] * factor))
        if depth % 2:
            target[depth // 2 * rows * 2] = np.int16(np.rint(x[depth - 1] * factor))
            target[depth // 2 * rows * 2 + 1] = np.int16(0)
        return top / np.float32(limit) + wrong

    @nb.njit(cache=True, error_model="numpy")
    def _quantize_rows(scratch, steps, x, stride, first, end, depth, limit, rows, low, high):  # type: ignore[no-untyped-def]
        """Quantize rows [low, high), counted from `first`, into blocks [pairs, rows of a tile, 2].

        Padding rows, from `end` on, repeat the last row.
        """
        pairs = (depth + 1) // 2
        for i in range(low, high):
            block = shorts(scratch + i // rows * rows * pairs * 4, rows * pairs * 2)
            row = floats(x + min(first + i, end - 1) * stride * 4, depth)
            steps[i] = _quantize_row(block[i % rows * 2 :], rows, row, depth, limit)

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
        scratch,
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
    ):
        """Quantized rows [first, end) times panels [low, high)."""
        pairs = (depth + 1) // 2
        out = np.empty(rows * panels * LANES, np.int32)
        panel_bytes = pairs * 2 * LANES
        p = low
        while p < high and p * LANES < n:
            here = panels if p + panels <= high else PANEL_STEP
            width, column = here * LANES, p * LANES
            added, panel = 0 if bias == 0 else bias + column * 4, w + p * panel_bytes
            last = min(width, n - column)
            if args[BIASES_ARG] != 0:
                add_biases(y, y_stride, first, end - first, column, last, args, BIASES_ARG, False)
            for block in range(tiles):
                done = first + block * rows
                x = scratch + block * rows * pairs * 4
                later = (
                    panel + PREFETCH_BYTES
                    if tiles == 1
                    else panel + (here * pairs + block * (pairs // tiles)) * 2 * LANES
                )
                target, some = y + (done * y_stride + column) * 4, min(rows, end - done)
                prefetch_outputs(target, y_stride, some, last)
                _run_tile(
                    rows,
                    here,
                    panel,
                    x,
                    out.ctypes.data,
                    pairs,
                    panel_bytes,
                    later,
                    2 * LANES // tiles,
                )
                by_row, by_output = steps[block * rows :], scales + column * 4
                _write(target, y_stride, out.ctypes.data, width, some, last, by_row, by_output, added)
                if args[BIASES_ARG] != 0:
                    add_biases(target, y_stride, done, some, column, last, args, BIASES_ARG, True)
            p += here

    @kernel
    def _linear(args):  # type: ignore[no-untyped-def]
        depth, n, scratch, limit = args[0], args[1], args[2], args[3]
        w, scales, bias = args[4], args[5], args[6]
        count, x, x_stride, y, y_stride = args[7], args[8], args[9], args[10], args[11]
        thread, threads = thread_num(), num_threads()
        low, high = panels_of_thread(n, thread, threads)
        pieces = (count + CHUNK_ROWS - 1) // CHUNK_ROWS  # of about equal size: each reads the weight
        for piece in range(pieces):
            first, end = count * piece // pieces, count * (piece + 1) // pieces
            rows, panels, tiles = tiles_for(end - first)
            total = rows * tiles
            steps = floats(scratch, total)
            blocks = scratch + total * 4
            if first > 0:
                barrier()
            mine = (total * thread // threads, total * (thread + 1) // threads)
            _quantize_rows(blocks, steps, x, x_stride, first, end, depth, limit, rows, mine[0], mine[1])
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
    """PackedLinear with the weight in int8. Its parts are the panels, and the scales [panels, 16]."""

    input_multiple = 2  # inputs are padded to a multiple of these

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """Quantize and pack a weight [out, in]; bias [out]."""
        outputs, inputs = weight.shape
        quantized, scales = quantize(weight)
        panels = cls.packed(quantized)
        by_panel = F.pad(scales, (0, len(panels) * LANES - outputs)).view(-1, LANES)
        return cls((panels, by_panel), inputs, outputs, bias)

    @classmethod
    def packed_bytes(cls, outputs: int, inputs: int) -> int:
        scale = 4
        return padded(outputs) * (inputs + -inputs % cls.input_multiple + scale)

    @staticmethod
    def packed(quantized: torch.Tensor) -> torch.Tensor:
        """int8 [out, in] as panels of the kernel."""
        return pack(quantized)

    @staticmethod
    def unpacked(panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
        """The int8 [out, in] of `packed`."""
        return unpack(panels, outputs, inputs)

    def weight(self) -> torch.Tensor:
        """The dequantised weight [out, in]."""
        panels, scales = self.parts
        return self.unpacked(panels, self.outputs, self.inputs) * scales.flatten()[: self.outputs, None]

    def __call__(self, x: torch.Tensor, biases: Biases | None = None) -> torch.Tensor:
        if PackedLinear.unrounded_inputs:
            assert biases is None, "only equality checks of the base compute without rounding"
            return F.linear(x, self.weight(), self.bias)
        return super().__call__(x, biases)

    def _sizes(self) -> tuple[int, ...]:
        return *super()._sizes(), max_quantized_input(self.inputs)

    def _launch(self, args: Arguments) -> None:
        _linear(args)
