"""y = x W^T + b for a weight that stays: read once from memory, at nearly the speed that memory has.

The weight lies in panels of 16 outputs, [panels, in, 16]: an output's lane in a panel sits in the same place
of a vector register for every input, so a tile of rows x panels keeps all its sums in registers and reads
each weight once. Rows are laid out beside each other, [in, rows], where a tile takes them by broadcast.

Each sum runs over the inputs in their order, 192 at a time, whatever the tile: a row's result is the same bit
for bit alone and in any batch. Measured with SmolLM2-135M's linears (two AVX-512 cores): 19/21/23/29/49 ms a
step at 1/4/8/16/32 rows, against 25/28/33/40/58 of oneDNN's own packed form.
"""

import torch
import torch.nn.functional as F

from server.kernels.openmp import AVAILABLE, Arguments, arguments, empty

LANES = 16  # outputs of a panel
GROUP = 4  # panels at a time, at most; a packed weight has a multiple of these
BY_ROWS = 64  # from so many rows on, threads share rows instead of outputs
CHUNK = 120  # rows that a thread lays out at a time: they stay in its own cache
DEPTH = 192  # inputs at a time: a tile's panels stay in the first-level cache, and rounding errors small


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] as panels [out / 16, in, 16], with zeros up to a multiple of 64 outputs."""
    outputs, inputs = weight.shape
    width = padded(outputs)
    panels = weight.new_zeros(width // LANES, inputs, LANES)
    whole = weight if width == outputs else F.pad(weight, (0, 0, 0, width - outputs))
    panels.copy_(whole.view(-1, LANES, inputs).transpose(1, 2))
    return panels


def padded(outputs: int) -> int:
    """How many outputs a packed weight has room for."""
    return -(-outputs // (LANES * GROUP)) * LANES * GROUP


def unpack(panels: torch.Tensor, outputs: int) -> torch.Tensor:
    """The weight [out, in] again, bit for bit."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:outputs].contiguous()


def linear_reference(
    x: torch.Tensor, panels: torch.Tensor, outputs: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """The plain twin of `PackedLinear`."""
    return F.linear(x, unpack(panels, outputs), bias)


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.openmp import floats, kernel, num_threads, thread_num
    from server.kernels.tiles import WIDE, Float32, tile

    # rows -> panels of the tiles there are: as many sums as the registers hold (32 of 16 lanes, or 16 of 8).
    # A longer run of rows goes through tiles of MANY rows.
    TILES = {1: 4, 2: 4, 4: 4, 8: 2, 12: 2, 16: 1} if WIDE else {1: 4, 2: 2, 3: 1, 4: 1, 5: 1, 6: 1}
    MANY = 12 if WIDE else 6
    MOST = max(TILES)
    R0, R1, R2, R3, R4, R5 = TILES
    P0, P1, P2, P3, P4, P5 = TILES.values()
    _t0, _t1, _t2, _t3, _t4, _t5 = (tile(rows, panels, Float32()) for rows, panels in TILES.items())

    @nb.njit(cache=True, error_model="numpy")
    def _run_tile(rows, w, x, out, depth, panel_bytes):  # type: ignore[no-untyped-def]
        if rows == R0:
            _t0(w, x, out, depth, panel_bytes)
        elif rows == R1:
            _t1(w, x, out, depth, panel_bytes)
        elif rows == R2:
            _t2(w, x, out, depth, panel_bytes)
        elif rows == R3:
            _t3(w, x, out, depth, panel_bytes)
        elif rows == R4:
            _t4(w, x, out, depth, panel_bytes)
        else:
            _t5(w, x, out, depth, panel_bytes)

    @nb.njit(cache=True, error_model="numpy")
    def tile_for(count):  # type: ignore[no-untyped-def]
        """The tile for the next of `count` rows: (its rows, its panels)."""
        if count <= R0:
            return R0, P0
        if count <= R1:
            return R1, P1
        if count <= R2:
            return R2, P2
        if count <= R3:
            return R3, P3
        if count <= R4 or (count > R5 and MANY == R4):
            return R4, P4
        return R5, P5

    @nb.njit(cache=True, error_model="numpy")
    def _lay_out(beside, x, stride, first, end, depth):  # type: ignore[no-untyped-def]
        """Rows [first, end) of x as blocks [in, rows of a tile]. What a block has too many repeats a row."""
        at, start = first, 0
        while at < end:
            rows, _ = tile_for(end - at)
            block = beside[start : start + rows * depth]
            r = 0
            while r + 4 <= rows:  # four at a time: their values are stored together
                x0 = floats(x + min(at + r, end - 1) * stride * 4, depth)
                x1 = floats(x + min(at + r + 1, end - 1) * stride * 4, depth)
                x2 = floats(x + min(at + r + 2, end - 1) * stride * 4, depth)
                x3 = floats(x + min(at + r + 3, end - 1) * stride * 4, depth)
                for k in range(depth):
                    block[k * rows + r] = x0[k]
                    block[k * rows + r + 1] = x1[k]
                    block[k * rows + r + 2] = x2[k]
                    block[k * rows + r + 3] = x3[k]
                r += 4
            while r < rows:
                x0 = floats(x + min(at + r, end - 1) * stride * 4, depth)
                for k in range(depth):
                    block[k * rows + r] = x0[k]
                r += 1
            start += rows * depth
            at += rows

    @nb.njit(cache=True, error_model="numpy")
    def _write(y, y_stride, out, width, count, last, bias):  # type: ignore[no-untyped-def]
        """`count` rows of `last` sums each, from out [rows, width], plus the bias."""
        for r in range(count):
            target = floats(y + r * y_stride * 4, last)
            if bias != 0:
                added = floats(bias, last)
                for j in range(last):
                    target[j] = out[r * width + j] + added[j]
            else:
                for j in range(last):
                    target[j] = out[r * width + j]

    @nb.njit(cache=True, error_model="numpy")
    def _multiply(x, x_stride, y, y_stride, w, bias, depth, n, first, end, low, high):  # type: ignore[no-untyped-def]
        """Rows [first, end) times the outputs of groups [low, high)."""
        beside = np.empty((end - first + MOST) * depth, np.float32)
        out = np.empty((end - first + MOST) * 2 * LANES + MOST * GROUP * LANES, np.float32)
        _lay_out(beside, x, x_stride, first, end, depth)
        panel_bytes = depth * 4 * LANES
        # all rows of a long run go through equal tiles, but for the last few: their panels come by themselves
        at, start = first, 0
        while at < end:
            rows, panels = tile_for(end - at)
            whole = max(1, (end - at - MOST + rows - 1) // rows)
            width = panels * LANES
            for column in range(low * GROUP * LANES, min(high * GROUP * LANES, n), width):
                out[: whole * rows * width] = np.float32(0)
                weight = w + column // LANES * panel_bytes
                for k in range(0, depth, DEPTH):
                    for block in range(whole):
                        _run_tile(
                            rows,
                            weight + k * 4 * LANES,
                            beside.ctypes.data + (start + (block * depth + k) * rows) * 4,
                            out.ctypes.data + block * rows * width * 4,
                            min(DEPTH, depth - k),
                            panel_bytes,
                        )
                count = min(whole * rows, end - at)
                added = 0 if bias == 0 else bias + column * 4
                _write(
                    y + (at * y_stride + column) * 4,
                    y_stride,
                    out,
                    width,
                    count,
                    min(width, n - column),
                    added,
                )
            start += whole * rows * depth
            at += whole * rows

    @kernel
    def _linear(args):  # type: ignore[no-untyped-def]
        depth, n, w, bias = args[0], args[1], args[2], args[3]
        rows, x, x_stride, y, y_stride = args[4], args[5], args[6], args[7], args[8]
        groups = (n + GROUP * LANES - 1) // (GROUP * LANES)
        thread, threads = thread_num(), num_threads()
        if rows < BY_ROWS:
            low, high = groups * thread // threads, groups * (thread + 1) // threads
            _multiply(x, x_stride, y, y_stride, w, bias, depth, n, 0, rows, low, high)
            return
        blocks = (rows + MANY - 1) // MANY
        first, end = blocks * thread // threads * MANY, min(blocks * (thread + 1) // threads * MANY, rows)
        for at in range(first, end, CHUNK):
            _multiply(x, x_stride, y, y_stride, w, bias, depth, n, at, min(at + CHUNK, end), 0, groups)


class PackedLinear:
    """A packed weight [out, in] and its bias, ready to be called. CPU; x is float32.

    `parts` is what the weight is made of, each [panels, ...].
    """

    def __init__(
        self, parts: tuple[torch.Tensor, ...], inputs: int, outputs: int, bias: torch.Tensor | None
    ) -> None:
        self.inputs, self.outputs, self.bias = inputs, outputs, bias
        self.hold(parts)

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> "PackedLinear":
        outputs, inputs = weight.shape
        return cls((pack(weight),), inputs, outputs, bias)

    def hold(self, parts: tuple[torch.Tensor, ...]) -> None:
        """The same values, lying elsewhere."""
        self.parts = parts
        bias = 0 if self.bias is None else self.bias.data_ptr()
        self._fixed = (*self._sizes(), *(part.data_ptr() for part in parts), bias)

    def weight(self) -> torch.Tensor:
        """[out, in], bit for bit."""
        return unpack(self.parts[0], self.outputs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in], T > 0; [T, out]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        y = empty(x, x.shape[0], self.outputs)
        place = (x.shape[0], x.data_ptr(), x.stride(0), y.data_ptr(), self.outputs)
        self._launch(arguments(*self._fixed, *place))
        return y

    def _sizes(self) -> tuple[int, ...]:
        return self.inputs, self.outputs

    def _launch(self, args: Arguments) -> None:
        _linear(args)


def join(members: list[PackedLinear]) -> tuple[PackedLinear, list[slice]]:
    """One linear that gives the outputs of all, each in columns of its own, over the same memory."""
    parts = tuple(torch.cat(same) for same in zip(*(member.parts for member in members), strict=True))
    width = len(parts[0]) * LANES
    given = any(member.bias is not None for member in members)
    bias = torch.zeros(width) if given else None
    columns, at = [], 0
    for member in members:
        end = at + len(member.parts[0])
        columns.append(slice(at * LANES, at * LANES + member.outputs))
        member.hold(tuple(part[at:end] for part in parts))
        if bias is not None and member.bias is not None:
            bias[columns[-1]] = member.bias
        at = end
    return type(members[0])(parts, members[0].inputs, width, bias), columns
