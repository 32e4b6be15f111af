"""Biases of each token's adapter, added by the kernel that has just computed the outputs: these are in the L1
cache then, and no further launch is needed.

Only for adapters that change a site by nothing but a bias; grouped_affine.py adds all others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from server.kernels.cpu.grouped_affine import (  # compiled in: numba sees only changes of this file
    BIAS,
    COLUMNS,
    GAIN,
    RANK,
)
from server.kernels.cpu.openmp import AVAILABLE


class Biases(NamedTuple):
    """The biases of a batch's tokens at some sites."""

    slots: torch.Tensor  # int64 [T], 0 for none
    table: torch.Tensor  # int64 [slots, sites, COLUMNS], as grouped_affine.py has it
    first: int  # number of the first site in the table
    columns: Sequence[slice]  # of each site's outputs

    def arguments(self) -> tuple[int, ...]:
        """For a kernel: (slots, the first site's table row, the table's stride, number of sites, columns)."""
        row = self.table.data_ptr() + self.first * COLUMNS * 8
        ends = (end for columns in self.columns for end in (columns.start, columns.stop))
        return self.slots.data_ptr(), row, self.table.stride(0), len(self.columns), *ends


NO_BIASES = (0, 0, 0, 0)  # Biases.arguments() of a batch without any


if AVAILABLE:
    import numba as nb

    from server.kernels.cpu.llvm_tiles import prefetch_line
    from server.kernels.cpu.openmp import floats, ints

    CACHE_LINE_BYTES = 64  # one cache line

    @nb.njit(cache=True, error_model="numpy")
    def _add(y, y_bytes, count, bias, width):  # type: ignore[no-untyped-def]
        for t in range(count):
            target = floats(y + t * y_bytes, width)
            for i in range(width):
                target[i] += bias[i]

    @nb.njit(cache=True, error_model="numpy")
    def add_biases(y, y_stride, first, count, column, width, args, at, now):  # type: ignore[no-untyped-def]
        """Add to y [count, width]: outputs from `column` on, tokens from `first` on; biases are `args[at:]`.

        Not `now`: only prefetch the biases, whose pieces the processor's prefetcher does not find.
        """
        slots, table, stride = ints(args[at] + first * 8, count), args[at + 1], args[at + 2] * 8
        for s in range(args[at + 3]):
            start, end = args[at + 4 + 2 * s], args[at + 5 + 2 * s]
            low, high = max(start, column), min(end, column + width)
            t = 0
            while low < high and t < count:
                slot, run = slots[t], t + 1  # tokens of one slot stand side by side in prefill
                while run < count and slots[run] == slot:
                    run += 1
                entry = ints(table + slot * stride + s * COLUMNS * 8, COLUMNS)
                if slot != 0 and entry[BIAS] != 0 and entry[RANK] == 0 and entry[GAIN] == 0:
                    own = entry[BIAS] + (low - start) * 4
                    if now:
                        target = y + (t * y_stride + low - column) * 4
                        _add(target, y_stride * 4, run - t, floats(own, high - low), high - low)
                    else:
                        for line in range(own, own + (high - low) * 4, CACHE_LINE_BYTES):
                            prefetch_line(line)
                t = run
