"""y = x W^T + b with a packed constant weight, read once from memory at nearly the memory's bandwidth.

The weight is packed in panels of 16 outputs, [panels, in, 16]: an output has the same lane of a vector
register for every input, so a tile of rows x panels keeps all its sums in registers and reads each weight
once. Rows are interleaved, [in, rows], from where a tile broadcasts them.

Each sum runs over the inputs in their order, 192 at a time, in every tile: a row's result is the same bit for
bit alone and in any batch. Measured with SmolLM2-135M's linears (two AVX-512 cores): 19/21/23/29/49 ms a
step at 1/4/8/16/32 rows, against 25/28/33/40/58 of oneDNN's own packed form.
"""

import torch
import torch.nn.functional as F

from server.kernels.cpu.fused_bias import NO_BIASES, Biases
from server.kernels.cpu.openmp import AVAILABLE, Arguments, arguments, empty, require

LANES = 16  # outputs of a panel
MAX_TILE_PANELS = 4  # a packed weight has a multiple of these
CHUNK_ROWS = 256  # at a time: all of a step's on a CPU. Interleaved, they stay in the L2 cache
PREFETCH_BYTES = 4096  # of a panel, ahead of its use, if one tile takes all rows
INPUT_CHUNK = 192  # at a time: a tile's panels stay in the L1 cache, and rounding errors stay small


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] as panels [out / 16, in, 16], padded with zeros to a multiple of 64 outputs."""
    outputs, inputs = weight.shape
    width = padded(outputs)
    panels = weight.new_zeros(width // LANES, inputs, LANES)
    whole = weight if width == outputs else F.pad(weight, (0, 0, 0, width - outputs))
    panels.copy_(whole.view(-1, LANES, inputs).transpose(1, 2))
    return panels


def padded(outputs: int) -> int:
    """The outputs of a packed weight, padding included."""
    return -(-outputs // (LANES * MAX_TILE_PANELS)) * LANES * MAX_TILE_PANELS


def unpack(panels: torch.Tensor, outputs: int) -> torch.Tensor:
    """The weight [out, in] that `pack` packed, bit for bit."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:outputs].contiguous()


def linear_reference(
    x: torch.Tensor, panels: torch.Tensor, outputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """Reference implementation of PackedLinear: [T, outputs] of x [T, in], panels and bias [outputs]."""
    return F.linear(x, unpack(panels, outputs), bias)


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.fused_bias import add_biases  # compiled in: numba sees only changes of this file
    from server.kernels.cpu.llvm_tiles import HAS_AVX512, Float32, prefetch_line, tile
    from server.kernels.cpu.openmp import barrier, floats, kernel, num_threads, thread_num

    # tile sizes, rows -> panels: as many sums as fit into registers (32 of 16 lanes, or 16 of 8)
    TILES = {1: 4, 2: 4, 4: 4, 8: 2, 12: 2} if HAS_AVX512 else {1: 4, 2: 2, 3: 1, 4: 1, 6: 1}
    CACHE_LINE_FLOATS = 16  # one cache line
    PANEL_STEP = 2  # a thread takes a multiple of these
    # rows of tiles, where there are more rows than one tile takes
    LARGE_TILE, SMALL_TILE = (12, 8) if HAS_AVX512 else (6, 4)
    BIASES_ARG = 10  # index of Biases.arguments() in a launch's arguments
    R0, R1, R2, R3, R4 = TILES
    P0, P1, P2, P3, P4 = TILES.values()
    LARGE_PANELS, SMALL_PANELS = TILES[LARGE_TILE], TILES[SMALL_TILE]
    _t0, _t1, _t2, _t3, _t4 = (tile(rows, panels, Float32()) for rows, panels in TILES.items())
    _h0, _h1, _h2 = (tile(rows, min(panels, PANEL_STEP), Float32()) for rows, panels in [*TILES.items()][:3])

    @nb.njit(cache=True, error_model="numpy")
    def _run_tile(rows, half, w, x, out, depth, panel_bytes, later, pace):  # type: ignore[no-untyped-def]
        """`half`: on PANEL_STEP panels, where the tile has more."""
        if rows == R0:
            if half:
                _h0(w, x, out, depth, panel_bytes, later, pace)
            else:
                _t0(w, x, out, depth, panel_bytes, later, pace)
        elif rows == R1:
            if half:
                _h1(w, x, out, depth, panel_bytes, later, pace)
            else:
                _t1(w, x, out, depth, panel_bytes, later, pace)
        elif rows == R2:
            if half:
                _h2(w, x, out, depth, panel_bytes, later, pace)
            else:
                _t2(w, x, out, depth, panel_bytes, later, pace)
        elif rows == R3:
            _t3(w, x, out, depth, panel_bytes, later, pace)
        else:
            _t4(w, x, out, depth, panel_bytes, later, pace)

    @nb.njit(cache=True, error_model="numpy")
    def tiles_for(count):  # type: ignore[no-untyped-def]
        """Equal tiles for `count` rows: (rows and panels of one, how many)."""
        if count <= R0:
            return R0, P0, 1
        if count <= R1:
            return R1, P1, 1
        if count <= R2:
            return R2, P2, 1
        if count <= R3:
            return R3, P3, 1
        large, small = (count + LARGE_TILE - 1) // LARGE_TILE, (count + SMALL_TILE - 1) // SMALL_TILE
        if small * SMALL_TILE < large * LARGE_TILE:  # less padding
            return SMALL_TILE, SMALL_PANELS, small
        return LARGE_TILE, LARGE_PANELS, large

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

    @nb.njit(cache=True, error_model="numpy")
    def prefetch_outputs(y, y_stride, count, last):  # type: ignore[no-untyped-def]
        """Prefetch where `count` rows of `last` sums will be written: rows lie a page or more apart."""
        for r in range(count):
            for j in range(0, last, CACHE_LINE_FLOATS):
                prefetch_line(y + (r * y_stride + j) * 4)

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
                        here < panels,
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
        shares = (n + PANEL_STEP * LANES - 1) // (PANEL_STEP * LANES)
        thread, threads = thread_num(), num_threads()
        low, high = shares * thread // threads * PANEL_STEP, shares * (thread + 1) // threads * PANEL_STEP
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


_row_buffers: dict[int, torch.Tensor] = {}


def row_buffer(inputs: int) -> torch.Tensor:
    """Scratch float32 for the interleaved rows of a launch, shared: launches run one at a time."""
    if inputs not in _row_buffers:
        _row_buffers[inputs] = torch.empty((CHUNK_ROWS + 12) * (inputs + 2))
    return _row_buffers[inputs]


class PackedLinear:
    """A linear with a packed weight [out, in] and a bias [out]. CPU; x is float32.

    `parts` are the tensors of the packed weight, each [panels, ...].
    """

    def __init__(
        self, parts: tuple[torch.Tensor, ...], inputs: int, outputs: int, bias: torch.Tensor | None
    ) -> None:
        self.inputs, self.outputs, self.bias = inputs, outputs, bias
        self.set_parts(parts)

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> "PackedLinear":
        """Pack a weight [out, in]; bias [out]."""
        outputs, inputs = weight.shape
        return cls((pack(weight),), inputs, outputs, bias)

    def set_parts(self, parts: tuple[torch.Tensor, ...]) -> None:
        """Use these tensors, of the same values at other addresses."""
        self.parts = parts
        bias = 0 if self.bias is None else self.bias.data_ptr()
        self._fixed = (*self._sizes(), *(part.data_ptr() for part in parts), bias)

    def weight(self) -> torch.Tensor:
        """The weight [out, in], bit for bit."""
        return unpack(self.parts[0], self.outputs)

    def __call__(self, x: torch.Tensor, biases: Biases | None = None) -> torch.Tensor:
        """y [T, out] of x [T, in], T > 0, with each token's own biases. Raises ShapeError."""
        require(x.shape[1] == self.inputs, "inputs of another width")
        if x.stride(1) != 1:
            x = x.contiguous()
        y = empty(x, x.shape[0], self.outputs)
        batch = (x.shape[0], x.data_ptr(), x.stride(0), y.data_ptr(), self.outputs)
        self._launch(arguments(*self._fixed, *batch, *(biases.arguments() if biases else NO_BIASES)))
        return y

    def _sizes(self) -> tuple[int, ...]:
        return self.inputs, self.outputs, row_buffer(self.inputs).data_ptr()

    def _launch(self, args: Arguments) -> None:
        _linear(args)


def join(members: list[PackedLinear]) -> tuple[PackedLinear, list[slice]]:
    """(a linear with the outputs of all members, the columns of each). Their weights become views of it."""
    parts = tuple(torch.cat(same) for same in zip(*(member.parts for member in members), strict=True))
    width = len(parts[0]) * LANES
    has_bias = any(member.bias is not None for member in members)
    bias = torch.zeros(width) if has_bias else None
    columns, start = [], 0
    for member in members:
        end = start + len(member.parts[0])
        columns.append(slice(start * LANES, start * LANES + member.outputs))
        member.set_parts(tuple(part[start:end] for part in parts))
        if bias is not None and member.bias is not None:
            bias[columns[-1]] = member.bias
        start = end
    return type(members[0])(parts, members[0].inputs, width, bias), columns
