"""Copy many small matrices into one buffer, each times its factor, in one call that releases the GIL.

From float32 or bfloat16 to either, rounded to the nearest.

Adapters are loaded while the engine runs, whose Python waits for the loader's: a LoRA has hundreds of
tensors, and torch holds the interpreter for some ten microseconds for each.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from server.kernels.cpu.openmp import AVAILABLE, bits_of

Table = npt.NDArray[np.int64]  # [parts, COLUMNS]
SOURCE, TARGET, HEIGHT, WIDTH, DOWN, ACROSS, FACTOR, ITEM, COLUMNS = range(9)
DTYPES = (torch.float32, torch.bfloat16)
TILE = 64  # columns: those of a transposed source stay in the L1 cache


class Copies(NamedTuple):
    """Copies of parts into one flat tensor. Source addresses are relative to the `base` of `run`."""

    table: Table
    numbers: int  # elements of all parts
    dtype: torch.dtype = torch.float32  # of the result

    def run(self, base: int) -> torch.Tensor | None:
        """Copy from `base`: [numbers]; None if an element is NaN or infinite, or becomes so in `dtype`."""
        flat = torch.empty(self.numbers, dtype=self.dtype)
        return flat if _gather(base, self.table, flat.data_ptr(), flat.itemsize) else None

    def within(self, memory: torch.Tensor) -> "Copies | None":
        """Rebase absolute addresses to offsets within `memory`; None if a part lies outside it."""
        table = self.table.copy()
        table[:, SOURCE] -= memory.data_ptr()
        last = table[:, (HEIGHT, WIDTH)] - 1
        ends = table[:, SOURCE] + table[:, ITEM] * (1 + (last * table[:, (DOWN, ACROSS)]).sum(1))
        inside = bool((table[:, SOURCE] >= 0).all() and (ends <= memory.nbytes).all())
        return self._replace(table=table) if inside else None


def copies_of(
    parts: list[torch.Tensor], factors: list[float], dtype: torch.dtype = torch.float32
) -> Copies | None:
    """The copies of `parts`, 1-D or 2-D, times `factors`, at absolute addresses (base 0) while they live.

    None if a part is of another shape, type or device, or numba is missing.
    """
    if not AVAILABLE or not parts or dtype not in DTYPES:
        return None
    rows, target = [], 0
    for part, factor in zip(parts, factors, strict=True):
        shape, strides = part.shape, part.stride()
        if part.dtype not in DTYPES or part.device.type != "cpu" or not 1 <= len(shape) <= 2:
            return None
        if part.numel() == 0:
            continue
        height, down = (shape[0], strides[0]) if len(shape) == 2 else (1, 0)
        sizes = (height, shape[-1], down, strides[-1])
        rows.append((part.data_ptr(), target, *sizes, bits_of(factor), part.itemsize))
        target += height * shape[-1]
    return Copies(np.array(rows, dtype=np.int64).reshape(-1, COLUMNS), target, dtype)


if AVAILABLE:
    import numba as nb

    from server.kernels.cpu.openmp import bits_to_float, float_to_bits, floats, shorts

    MAX_FLOAT32 = np.float32(torch.finfo(torch.float32).max)
    MAX_BFLOAT16 = np.float32(torch.finfo(torch.bfloat16).max)

    @nb.njit(cache=True, error_model="numpy", nogil=True)
    def _read(scratch, address, across, count, factor, item, largest):  # type: ignore[no-untyped-def]
        """Read `count` numbers, `across` apart, times the factor. Returns whether one exceeds `largest` or is
        NaN.
        """
        bad, apart = 0, (count - 1) * across + 1
        if item == 4 and across == 1:
            plain = floats(address, count)
            for i in range(count):
                scratch[i] = plain[i] * factor
        elif item == 4:
            wide = floats(address, apart)
            for i in range(count):
                scratch[i] = wide[i * across] * factor
        else:
            narrow = shorts(address, apart)
            for i in range(count):
                scratch[i] = bits_to_float(np.int32(narrow[i * across]) << np.int32(16)) * factor
        for i in range(count):
            bad |= not abs(scratch[i]) <= largest
        return bad

    @nb.njit(cache=True, error_model="numpy", nogil=True)
    def _write(scratch, address, count, item):  # type: ignore[no-untyped-def]
        if item == 4:
            wide = floats(address, count)
            for i in range(count):
                wide[i] = scratch[i]
        else:  # round to nearest, ties to even
            narrow = shorts(address, count)
            for i in range(count):
                bits = float_to_bits(scratch[i])
                odd = (bits >> np.int32(16)) & np.int32(1)
                narrow[i] = np.int16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))

    # compiled on import, and not by the first load while rows run
    @nb.njit("boolean(int64, int64[:, ::1], int64, int64)", cache=True, error_model="numpy", nogil=True)
    def _gather(base, table, out, item):  # type: ignore[no-untyped-def]
        bad = 0
        scratch = np.empty(TILE, np.float32)
        largest = MAX_FLOAT32 if item == 4 else MAX_BFLOAT16
        for n in range(table.shape[0]):
            own = table[n]
            height, width, across = own[HEIGHT], own[WIDTH], own[ACROSS]
            factor = bits_to_float(np.int32(own[FACTOR]))
            for start in range(0, width, TILE):
                count = min(TILE, width - start)
                for row in range(height):
                    at = base + own[SOURCE] + (row * own[DOWN] + start * across) * own[ITEM]
                    bad |= _read(scratch, at, across, count, factor, own[ITEM], largest)
                    _write(scratch, out + (own[TARGET] + row * width + start) * item, count, item)
        return bad == 0
