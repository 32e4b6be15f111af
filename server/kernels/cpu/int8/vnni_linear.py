"""y = x W^T + b with a weight in int8 and inputs of 8 bits, for processors that multiply bytes (VNNI).

An instruction makes twice as many products as with inputs of 16 bits (linear.py, for every other processor).
Inputs are coarser in return: each group of 64 is scaled by its largest. The cost: docs/performance.md.

Panels of 16 outputs, inputs in fours, each weight plus 128: uint8 [panels, quads, 16, 4].
"""

import torch
import torch.nn.functional as F

from server.kernels.cpu.int8.linear import Int8Linear
from server.kernels.cpu.int8.quantization import GROUP_INPUTS, MAX_INT8, MIN_GROUP_MAX, UNSIGNED_OFFSET
from server.kernels.cpu.openmp import AVAILABLE, Arguments
from server.kernels.cpu.packed_linear import CHUNK_ROWS, LANES, PREFETCH_BYTES, padded, row_buffer


def pack_bytes(quantized: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] as uint8 [out / 16, in / 4, 16, 4], padded to multiples of 64 outputs and 64 inputs."""
    outputs, inputs = quantized.shape
    width = padded(outputs)
    whole = F.pad(quantized, (0, -inputs % GROUP_INPUTS, 0, width - outputs)).view(torch.uint8)
    whole = whole ^ UNSIGNED_OFFSET
    return whole.view(width // LANES, LANES, -1, 4).transpose(1, 2).contiguous()


def unpack_bytes(panels: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The int8 [out, in] that `pack_bytes` packed."""
    whole = panels.transpose(1, 2).reshape(panels.shape[0] * LANES, -1)[:outputs, :inputs]
    return (whole ^ UNSIGNED_OFFSET).view(torch.int8)


def vnni_linear_reference(
    x: torch.Tensor, quantized: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Reference implementation of VnniLinear: [T, out] of x [T, in], quantized [out, in], scales [out]."""
    groups = F.pad(x, (0, -x.shape[1] % GROUP_INPUTS)).view(len(x), -1, GROUP_INPUTS)
    top = groups.abs().amax(2, keepdim=True).clamp(min=MIN_GROUP_MAX)
    whole = (groups * (torch.tensor(float(MAX_INT8)) / top)).round().double() * (top * (1 / MAX_INT8))
    y = (whole.view(len(x), -1)[:, : x.shape[1]] @ quantized.double().T).float() * scales
    return y if bias is None else y + bias


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.fused_bias import add_biases  # compiled in: numba sees only changes of this file
    from server.kernels.cpu.int8.vnni_tiles import GROUP_BYTES, HAS_VNNI, quantize_group, vnni_tile
    from server.kernels.cpu.llvm_tiles import any_tile
    from server.kernels.cpu.openmp import barrier, floats, kernel, num_threads, thread_num
    from server.kernels.cpu.packed_linear import (
        PANEL_STEP,
        TILE_SIZES,
        panels_of_thread,
        prefetch_outputs,
        tiles_for,
    )

    BIASES_ARG = 11  # index of Biases.arguments() in a launch's arguments
    _tiles = any_tile(vnni_tile, TILE_SIZES)

    @nb.njit(cache=True, error_model="numpy", fastmath=False)
    def _run_tile(rows, panels, w, x, out, groups, panel_bytes, later, pace):  # type: ignore[no-untyped-def]
        _tiles(rows, panels, w, x, out, groups, panel_bytes, later, pace)

    @nb.njit(cache=True, error_model="numpy", fastmath=False)
    def _quantize_rows(buffer, x, stride, first, end, depth, groups, rows, low, high):  # type: ignore[no-untyped-def]
        """Quantize rows [low, high), counted from `first`, into blocks of `rows`, one block a tile.

        Padding rows, from `end` on, repeat the last row.
        """
        rest = depth % GROUP_INPUTS
        scratch = np.zeros(GROUP_INPUTS, np.float32)
        for i in range(low, high):
            block = buffer + i // rows * rows * groups * GROUP_BYTES
            row = x + min(first + i, end - 1) * stride * 4
            for group in range(groups):
                source = row + group * GROUP_INPUTS * 4
                if rest and group == groups - 1:
                    values = floats(source, rest)
                    for k in range(rest):
                        scratch[k] = values[k]
                    source = scratch.ctypes.data
                quantize_group(source, block + group * rows * GROUP_BYTES, i % rows, rows)

    @nb.njit(cache=True, error_model="numpy", fastmath=False)
    def _write(y, y_stride, out, width, count, last, scales, bias):  # type: ignore[no-untyped-def]
        """`count` rows of `last` sums each, from out [rows, width], scaled back, plus the bias."""
        by_output = floats(scales, last)
        for r in range(count):
            target, sums = floats(y + r * y_stride * 4, last), floats(out + r * width * 4, last)
            if bias != 0:
                added = floats(bias, last)
                for j in range(last):
                    target[j] = sums[j] * by_output[j] + added[j]
            else:
                for j in range(last):
                    target[j] = sums[j] * by_output[j]

    @nb.njit(cache=True, error_model="numpy", fastmath=False)
    def _multiply(buffer, y, y_stride, args, groups, first, end, rows, panels, tiles, low, high):  # type: ignore[no-untyped-def]
        """Quantized rows [first, end) times panels [low, high)."""
        n, w, scales, bias = args[1], args[3], args[4], args[5]
        out = np.empty(rows * panels * LANES, np.float32)
        panel_bytes = groups * GROUP_INPUTS * LANES
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
                later = (
                    panel + PREFETCH_BYTES
                    if tiles == 1
                    else panel + here * panel_bytes + block * (panel_bytes // tiles)
                )
                target, some = y + (done * y_stride + column) * 4, min(rows, end - done)
                prefetch_outputs(target, y_stride, some, last)
                out[: rows * width] = np.float32(0)
                _run_tile(
                    rows,
                    here,
                    panel,
                    buffer + block * rows * groups * GROUP_BYTES,
                    out.ctypes.data,
                    groups,
                    panel_bytes,
                    later,
                    4 * LANES // tiles,
                )
                _write(target, y_stride, out.ctypes.data, width, some, last, scales + column * 4, added)
                if args[BIASES_ARG] != 0:
                    add_biases(target, y_stride, done, some, column, last, args, BIASES_ARG, True)
            p += here

    @kernel
    def _linear(args):  # type: ignore[no-untyped-def]
        depth, n, buffer = args[0], args[1], args[2]
        count, x, x_stride, y, y_stride = args[6], args[7], args[8], args[9], args[10]
        groups = (depth + GROUP_INPUTS - 1) // GROUP_INPUTS
        thread, threads = thread_num(), num_threads()
        low, high = panels_of_thread(n, thread, threads)
        pieces = (count + CHUNK_ROWS - 1) // CHUNK_ROWS  # of about equal size: each reads the weight
        for piece in range(pieces):
            first, end = count * piece // pieces, count * (piece + 1) // pieces
            rows, panels, tiles = tiles_for(end - first)
            total = rows * tiles
            if first > 0:
                barrier()
            mine = (total * thread // threads, total * (thread + 1) // threads)
            _quantize_rows(buffer, x, x_stride, first, end, depth, groups, rows, mine[0], mine[1])
            barrier()
            _multiply(buffer, y, y_stride, args, groups, first, end, rows, panels, tiles, low, high)


class VnniLinear(Int8Linear):
    """Int8Linear with inputs of 8 bits."""

    input_multiple = GROUP_INPUTS
    packed, unpacked = staticmethod(pack_bytes), staticmethod(unpack_bytes)

    def _sizes(self) -> tuple[int, ...]:
        return self.inputs, self.outputs, row_buffer(max(self.inputs, GROUP_INPUTS)).data_ptr()

    def _launch(self, args: Arguments) -> None:
        _linear(args)


FASTEST_INT8: type[Int8Linear] = VnniLinear if AVAILABLE and HAS_VNNI else Int8Linear  # of this processor
