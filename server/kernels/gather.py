"""Many small matrices into one buffer, each times its factor, in one call that leaves the interpreter alone.

Adapters are loaded beside the engine, whose Python waits while a loader's runs: a LoRA has hundreds of
tensors, and torch takes some ten microseconds of the interpreter for each.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from server.kernels.openmp import AVAILABLE, bits_of

Table = npt.NDArray[np.int64]  # [parts, COLUMNS]
SOURCE, TARGET, HEIGHT, WIDTH, DOWN, ACROSS, FACTOR, COLUMNS = range(8)
TILE = 64  # columns: what they take of a transposed source stays in the first-level cache


class Copies(NamedTuple):
    """Where the parts lie in one piece of memory, and where they go. Addresses count from `base`."""

    table: Table
    numbers: int  # in all

    def run(self, base: int) -> torch.Tensor | None:
        """float32 [numbers] of what lies at `base` now; None if a number is NaN or Inf."""
        flat = torch.empty(self.numbers, dtype=torch.float32)
        return flat if _gather(base, self.table, flat.data_ptr()) else None

    def within(self, memory: torch.Tensor) -> "Copies | None":
        """The same counted from where `memory` begins, if every part lies in it. Their base must be 0."""
        table = self.table.copy()
        table[:, SOURCE] -= memory.data_ptr()
        last = table[:, (HEIGHT, WIDTH)] - 1
        ends = table[:, SOURCE] + 4 * (1 + (last * table[:, (DOWN, ACROSS)]).sum(1))
        inside = bool((table[:, SOURCE] >= 0).all() and (ends <= memory.nbytes).all())
        return Copies(table, self.numbers) if inside else None


def copies_of(parts: list[torch.Tensor], factors: list[float]) -> Copies | None:
    """How to copy these from base 0, while they live; None if it takes more than this can."""
    if not AVAILABLE or not parts:
        return None
    rows, target = [], 0
    for part, factor in zip(parts, factors, strict=True):
        shape, strides = part.shape, part.stride()
        if part.dtype != torch.float32 or part.device.type != "cpu" or not 1 <= len(shape) <= 2:
            return None
        if part.numel() == 0:
            continue
        height, down = (shape[0], strides[0]) if len(shape) == 2 else (1, 0)
        rows.append((part.data_ptr(), target, height, shape[-1], down, strides[-1], bits_of(factor)))
        target += height * shape[-1]
    return Copies(np.array(rows, dtype=np.int64).reshape(-1, COLUMNS), target)


if AVAILABLE:
    import numba as nb

    from server.kernels.openmp import bits_to_float, floats

    LARGEST = np.float32(np.finfo(np.float32).max)

    @nb.njit(cache=True, error_model="numpy", nogil=True)
    def _copy(target, source, across, count, factor):  # type: ignore[no-untyped-def]
        bad = 0
        for i in range(count):
            value = source[i * across] * factor
            target[i] = value
            bad |= not abs(value) <= LARGEST
        return bad

    # compiled here, and not by the first load, beside rows that run
    @nb.njit("boolean(int64, int64[:, ::1], int64)", cache=True, error_model="numpy", nogil=True)
    def _gather(base, table, out):  # type: ignore[no-untyped-def]
        bad = 0
        for n in range(table.shape[0]):
            own = table[n]
            height, width, across = own[HEIGHT], own[WIDTH], own[ACROSS]
            factor = bits_to_float(np.int32(own[FACTOR]))
            for start in range(0, width, TILE):
                count = min(TILE, width - start)
                for row in range(height):
                    at = base + own[SOURCE] + (row * own[DOWN] + start * across) * 4
                    target = floats(out + (own[TARGET] + row * width + start) * 4, count)
                    if across == 1:
                        bad |= _copy(target, floats(at, count), 1, count, factor)
                    else:
                        source = floats(at, (count - 1) * across + 1)
                        bad |= _copy(target, source, across, count, factor)
        return bad == 0
