"""What every linear with a packed constant weight has in common, whatever its weight format.

A weight lies in panels of 16 outputs, [panels, inputs, 16] in some order: an output has the same lane of a
vector register for every input, so a tile of rows x panels keeps all its sums in registers and reads each
weight once. A row's result is the same bit for bit alone and in any batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch

from server.kernels.cpu.fused_bias import NO_BIASES, Biases
from server.kernels.cpu.openmp import AVAILABLE, Arguments, arguments, empty, require

LANES = 16  # outputs of a panel
MAX_TILE_PANELS = 4  # a packed weight has a multiple of these
CHUNK_ROWS = 256  # at a time: all of a step's on a CPU. Interleaved, they stay in the L2 cache
PREFETCH_BYTES = 4096  # of a panel, ahead of its use, if one tile takes all rows


def padded(outputs: int) -> int:
    """The outputs of a packed weight, padding included."""
    return -(-outputs // (LANES * MAX_TILE_PANELS)) * LANES * MAX_TILE_PANELS


if AVAILABLE:
    import numba as nb

    from server.kernels.cpu.llvm_tiles import HAS_AVX512, prefetch_line

    # tile sizes, rows -> panels: as many sums as fit into registers (32 of 16 lanes, or 16 of 8)
    TILES = {1: 4, 2: 4, 4: 4, 8: 2, 12: 2} if HAS_AVX512 else {1: 4, 2: 2, 3: 1, 4: 1, 6: 1}
    CACHE_LINE_FLOATS = 16  # one cache line
    PANEL_STEP = 2  # a thread takes a multiple of these
    # rows of tiles, where there are more rows than one tile takes
    LARGE_TILE, SMALL_TILE = (12, 8) if HAS_AVX512 else (6, 4)
    # Where a thread's last panels are fewer than a tile has, they are PANEL_STEP
    TILE_SIZES = [*TILES.items(), *((rows, PANEL_STEP) for rows, most in TILES.items() if most > PANEL_STEP)]
    R0, R1, R2, R3, _ = TILES
    P0, P1, P2, P3, _ = TILES.values()
    LARGE_PANELS, SMALL_PANELS = TILES[LARGE_TILE], TILES[SMALL_TILE]

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
    def panels_of_thread(outputs, thread, threads):  # type: ignore[no-untyped-def]
        """The panels [low, high) of `outputs` that a thread multiplies by."""
        shares = (outputs + PANEL_STEP * LANES - 1) // (PANEL_STEP * LANES)
        return shares * thread // threads * PANEL_STEP, shares * (thread + 1) // threads * PANEL_STEP

    @nb.njit(cache=True, error_model="numpy")
    def prefetch_outputs(y, y_stride, count, last):  # type: ignore[no-untyped-def]
        """Prefetch where `count` rows of `last` sums will be written: rows lie a page or more apart."""
        for r in range(count):
            for j in range(0, last, CACHE_LINE_FLOATS):
                prefetch_line(y + (r * y_stride + j) * 4)


_row_buffers: dict[int, torch.Tensor] = {}


def row_buffer(inputs: int) -> torch.Tensor:
    """Scratch float32 for the interleaved rows of a launch, shared: launches run one at a time."""
    if inputs not in _row_buffers:
        _row_buffers[inputs] = torch.empty((CHUNK_ROWS + 12) * (inputs + 2))
    return _row_buffers[inputs]


class PackedLinear:
    """A linear with a packed weight [out, in] and a bias [out]. CPU; x is float32.

    A weight format overrides `of`, `weight`, `packed_bytes` and `_launch`, and `_sizes` if its kernel takes
    other sizes. `parts` are the tensors of the packed weight, each [panels, ...].
    """

    unrounded_inputs = False  # see without_rounding; a format that rounds inputs heeds it

    def __init__(
        self, parts: tuple[torch.Tensor, ...], inputs: int, outputs: int, bias: torch.Tensor | None
    ) -> None:
        self.inputs, self.outputs, self.bias = inputs, outputs, bias
        self.set_parts(parts)

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Self:
        """Pack a float32 weight [out, in]; bias [out]."""
        raise NotImplementedError

    @classmethod
    def packed_bytes(cls, outputs: int, inputs: int) -> int:
        """Bytes of all parts of a packed weight [outputs, inputs]."""
        raise NotImplementedError

    @classmethod
    def join(cls, members: Sequence[Self]) -> tuple[Self, list[slice]]:
        """(a linear with the outputs of all members, the columns of each).

        The members see the same inputs; their weights become views of the joint one.
        """
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
        return cls(parts, members[0].inputs, width, bias), columns

    def set_parts(self, parts: tuple[torch.Tensor, ...]) -> None:
        """Use these tensors, of the same values at other addresses."""
        self.parts = parts
        bias = 0 if self.bias is None else self.bias.data_ptr()
        self._fixed = (*self._sizes(), *(part.data_ptr() for part in parts), bias)

    def weight(self) -> torch.Tensor:
        """The weight [out, in] in float32, as the kernel multiplies by it."""
        raise NotImplementedError

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
        """The first arguments of a launch; before the addresses of parts and bias, and the batch."""
        return self.inputs, self.outputs, row_buffer(self.inputs).data_ptr()

    def _launch(self, args: Arguments) -> None:
        raise NotImplementedError


@contextmanager
def without_rounding() -> Iterator[None]:
    """Inside, no linear rounds its inputs, so that rounding does not mask what an equality check of other
    code looks for: the last bit of a norm may change an input's integer.
    """
    PackedLinear.unrounded_inputs = True
    try:
        yield
    finally:
        PackedLinear.unrounded_inputs = False
