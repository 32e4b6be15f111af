"""y = x W^T + b with the weight in float32, read once from memory at nearly the memory's bandwidth.

Panels of 16 outputs, [panels, in, 16]. Rows are interleaved, [in, rows], from where a tile broadcasts them.

Each sum runs over the inputs in their order, 192 at a time, in every tile: a row's result is the same bit for
bit alone and in any batch. Measured with SmolLM2-135M's linears (two AVX-512 cores): 19/21/23/29/49 ms a
step at 1/4/8/16/32 rows, against 25/28/33/40/58 of oneDNN's own packed form.
"""

from typing import Self

import torch
import torch.nn.functional as F

from server.kernels.cpu.openmp import AVAILABLE, Arguments
from server.kernels.cpu.packed_linear import CHUNK_ROWS, LANES, PREFETCH_BYTES, PackedLinear, padded

INPUT_CHUNK = 192  # at a time: a tile's panels stay in the L1 cache, and rounding errors stay small


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] as panels [out / 16, in, 16], padded with zeros to a multiple of 64 outputs."""
    outputs, inputs = weight.shape
    width = padded(outputs)
    panels = weight.new_zeros(width // LANES, inputs, LANES)
    whole = weight if width == outputs else F.pad(weight, (0, 0, 0, width - outputs))
    panels.copy_(whole.view(-1, LANES, inputs).transpose(1, 2))
    return panels


def unpack(panels: torch.Tensor, outputs: int) -> torch.Tensor:
    """The weight [out, in] that `pack` packed, bit for bit."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:outputs].contiguous()


def linear_reference(
    x: torch.Tensor, panels: torch.Tensor, outputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Reference implementation of Float32Linear: [T, outputs] of x [T, in], panels and bias [outputs]."""
    return F.linear(x, unpack(panels, outputs), bias)


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.fused_bias import add_biases  # compiled in: numba sees only changes of this file
    from server.kernels.cpu.llvm_tiles import any_tile, float32_tile
    from server.kernels.cpu.openmp import barrier, floats, kernel, num_threads, thread_num
    from server.kernels.cpu.packed_linear import (
        PANEL_STEP,
        TILE_SIZES,
        panels_of_thread,
        prefetch_outputs,
        tiles_for,
    )

    BIASES_ARG = 10  # index of Biases.arguments() in a launch's arguments
    _tiles = any_tile(float32_tile, TILE_SIZES)

    @nb.njit(cache=True, error_model="numpy")
    def _run_tile(rows, panels, w, x, out, depth, panel_bytes, later, pace):  # type: ignore[no-untyped-def]
        _tiles(rows, panels, w, x, out, depth, panel_bytes, later, pace)

    @nb.njit(cache=True, error_model="numpy")
    def _interleave_rows(interleaved, x, stride, first, end, depth, rows, tiles, low, high):  # type: ignore[no-untyped-def]
        """Inputs [low, high) of rows [first, end) of x as blocks [in, rows] of `tiles` tiles.

        Padding rows repeat the last row.
        """
        for block in range(tiles):
            at = first + block * rows
            target = floats(interleaved + block * rows * depth * 4, rows * depth)
            r = 0
            while r + 4 <= rows:  # four at a time: their values are stored together
                x0 = floats(x + min(at + r, end - 1) * stride * 4, depth)
                x1 = floats(x + min(at + r + 1, end - 1) * stride * 4, depth)
                x2 = floats(x + min(at + r + 2, end - 1) * stride * 4, depth)
                x3 = floats(x + min(at + r + 3, end - 1) * stride * 4, depth)
                for k in range(low, high):
                    target[k * rows + r] = x0[k]
                    target[k * rows + r + 1] = x1[k]
                    target[k * rows + r + 2] = x2[k]
                    target[k * rows + r + 3] = x3[k]
                r += 4
            while r < rows:
                x0 = floats(x + min(at + r, end - 1) * stride * 4, depth)
                for k in range(low, high):
                    target[k * rows + r] = x0[k]
                r += 1

    @nb.njit(cache=True, error_model="numpy", fastmath=False)
    def _write(y, y_stride, out, width, count, last, bias):  # type: ignore[no-untyped-def]
        """`count` rows of `last` sums each, from out [rows, width], plus the bias."""
        for r in range(count):
            target, sums = floats(y + r * y_stride * 4, last), floats(out + r * width * 4, last)
            if bias != 0:
                added = floats(bias, last)
                for j in range(last):
                    target[j] = sums[j] + added[j]
            else:
                for j in range(last):
                    target[j] = sums[j]

    @nb.njit(cache=True, error_model="numpy")
    def _multiply(  # type: ignore[no-untyped-def]
        interleaved, y, y_stride, w, bias, depth, n, first, end, rows, panels, tiles, low, high, args
    ):
        """Interleaved rows [first, end) times panels [low, high)."""
        out = np.empty(tiles * rows * panels * LANES, np.float32)
        panel_bytes = depth * 4 * LANES
        p = low
        while p < high and p * LANES < n:
            here = panels if p + panels <= high else PANEL_STEP
            width, column = here * LANES, p * LANES
            target, last = y + (first * y_stride + column) * 4, min(width, n - column)
            if args[BIASES_ARG] != 0:
                add_biases(target, y_stride, first, end - first, column, last, args, BIASES_ARG, False)
            out[: tiles * rows * width] = np.float32(0)
            for k in range(0, depth, INPUT_CHUNK):
                panel, some = w + p * panel_bytes + k * 4 * LANES, min(INPUT_CHUNK, depth - k)
                # tiles after the first hit the cache: each prefetches its share of the next panels
                following = panel + some * 4 * LANES
                if k + INPUT_CHUNK >= depth:
                    following += (here - 1) * panel_bytes
                for block in range(tiles):
                    if k + INPUT_CHUNK >= depth:
                        done = block * rows
                        rows_left = min(rows, end - first - done)
                        prefetch_outputs(target + done * y_stride * 4, y_stride, rows_left, last)
                    later = (
                        panel + PREFETCH_BYTES
                        if tiles == 1
                        else following + block * (some * 4 * LANES // tiles)
                    )
                    _run_tile(
                        rows,
                        here,
                        panel,
                        interleaved + (block * depth + k) * rows * 4,
                        out.ctypes.data + block * rows * width * 4,
                        some,
                        panel_bytes,
                        later,
                        4 * LANES // tiles,
                    )
            added = 0 if bias == 0 else bias + column * 4
            _write(target, y_stride, out.ctypes.data, width, end - first, last, added)
            if args[BIASES_ARG] != 0:
                add_biases(target, y_stride, first, end - first, column, last, args, BIASES_ARG, True)
            p += here

    @kernel
    def _linear(args):  # type: ignore[no-untyped-def]
        depth, n, interleaved, w, bias = args[0], args[1], args[2], args[3], args[4]
        count, x, x_stride, y, y_stride = args[5], args[6], args[7], args[8], args[9]
        thread, threads = thread_num(), num_threads()
        low, high = panels_of_thread(n, thread, threads)
        pieces = (count + CHUNK_ROWS - 1) // CHUNK_ROWS  # of about equal size: each reads the weight
        for piece in range(pieces):
            first, end = count * piece // pieces, count * (piece + 1) // pieces
            rows, panels, tiles = tiles_for(end - first)
            if first > 0:
                barrier()
            mine = (depth * thread // threads, depth * (thread + 1) // threads)
            _interleave_rows(interleaved, x, x_stride, first, end, depth, rows, tiles, mine[0], mine[1])
            barrier()
            _multiply(
                interleaved, y, y_stride, w, bias, depth, n, first, end, rows, panels, tiles, low, high, args
            )


class Float32Linear(PackedLinear):
    """PackedLinear with the weight as it is. Its only part is the panels."""

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """Pack a weight [out, in]; bias [out]."""
        outputs, inputs = weight.shape
        return cls((pack(weight),), inputs, outputs, bias)

    @classmethod
    def packed_bytes(cls, outputs: int, inputs: int) -> int:
        return padded(outputs) * inputs * 4

    def weight(self) -> torch.Tensor:
        """The weight [out, in], bit for bit."""
        return unpack(self.parts[0], self.outputs)

    def _launch(self, args: Arguments) -> None:
        _linear(args)
