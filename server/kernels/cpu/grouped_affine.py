"""y += gain * (y - b) + B (A x) + bias, with another adapter for each row, read in place.

A step of 16 rows with 16 adapters must read every adapter's bytes once; gathering them into one batched
matrix would read them, write them and read them again. The kernel follows pointers instead. Successive tokens
of one adapter (prefill) share the reads (low_rank_tiles.py).

Table row of a (slot, site), int64: addresses of A [r, in], B^T [r, out], gain [out] and bias [out], each 0 if
absent, the rank r, and the bytes of a number of A and B: 4, or 2 for bfloat16 (see `supports_bfloat16`). All
scalings are folded in.
"""

from collections.abc import Sequence

import torch

from server.kernels.cpu.openmp import AVAILABLE, arguments, require
from server.kernels.limits import MAX_RANK

COLUMNS = 6
GAIN, BIAS, RANK, ITEM = 2, 3, 4, 5  # columns of a table row
NARROW_LANES = 32  # bfloat16 weights of one iteration
# Without matrices, one thread takes less time for fewer outputs than waking the others takes.
SINGLE_THREAD_MAX_OUTPUTS = 1 << 15


if AVAILABLE:
    import numba as nb
    import numpy as np

    from server.kernels.cpu.low_rank_tiles import TILE_TOKENS, expand, shrink
    from server.kernels.cpu.openmp import floats, ints, kernel, num_threads, thread_num

    @nb.njit(cache=True, error_model="numpy", fastmath={"contract"})
    def _apply(entry, x0, x1, x2, x3, y0, y1, y2, y3, tokens, fan_in, width, bias, h, add_bias_only):  # type: ignore[no-untyped-def]
        """Apply one site of one adapter to `tokens` (1 or TILE_TOKENS) of its tokens."""
        rank = entry[RANK]
        if entry[GAIN] != 0:
            gain = floats(entry[GAIN], width)
            for t in range(tokens):
                y = floats((y0, y1, y2, y3)[t], width)
                if bias != 0:
                    own = floats(bias, width)
                    for o in range(width):
                        y[o] += gain[o] * (y[o] - own[o])
                else:
                    for o in range(width):
                        y[o] += gain[o] * y[o]
        if rank > 0:
            scratch, between = h.ctypes.data, MAX_RANK * 4
            shrink(scratch, between, x0, x1, x2, x3, tokens, entry[0], rank, fan_in, entry[ITEM])
            expand(y0, y1, y2, y3, tokens, scratch, between, entry[1], rank, width, entry[ITEM])
        if entry[BIAS] != 0 and (add_bias_only or rank > 0 or entry[GAIN] != 0):
            added = floats(entry[BIAS], width)
            for t in range(tokens):
                y = floats((y0, y1, y2, y3)[t], width)
                for o in range(width):
                    y[o] += added[o]

    @nb.njit(cache=True, error_model="numpy")
    def _cost(table, sites, widths, fan_in, add_bias_only):  # type: ignore[no-untyped-def]
        """The bytes / 4 to read for one token at these sites."""
        total = 0
        for s in range(sites):
            width, entry = widths[s], ints(table + s * COLUMNS * 8, COLUMNS)
            if entry[RANK] or entry[GAIN] or (add_bias_only and entry[BIAS]):
                total += width + entry[RANK] * (fan_in + width) * entry[ITEM] // 4
        return total

    @kernel
    def _grouped_affine(args):  # type: ignore[no-untyped-def]
        count, fan_in, x_bytes, y_bytes, x, y = args[0], args[1], args[2] * 4, args[3] * 4, args[4], args[5]
        tokens, slots = ints(args[6], count), ints(args[7], count)
        table, table_bytes, bias, add_bias_only, sites = args[8], args[9] * 8, args[10], args[11], args[12]
        thread, threads = thread_num(), num_threads()
        widths = np.empty(sites, np.int64)
        for s in range(sites):
            widths[s] = args[13 + s]
        h = np.empty(TILE_TOKENS * MAX_RANK, np.float32)
        work = 0
        for i in range(count):
            work += _cost(table + slots[i] * table_bytes, sites, widths, fan_in, add_bias_only)
        # threads share the bytes read equally: tokens, or sites if there is one token
        low, high = work * thread // threads, work * (thread + 1) // threads
        done, i = 0, 0
        while i < count:
            own = table + slots[i] * table_bytes
            cost = _cost(own, sites, widths, fan_in, add_bias_only)
            some = 1
            if i + TILE_TOKENS <= count and slots[i + TILE_TOKENS - 1] == slots[i]:
                some = TILE_TOKENS
            mine = low <= done < high
            x0, y0 = x + tokens[i] * x_bytes, y + tokens[i] * y_bytes
            x1, y1, x2, y2, x3, y3 = x0, y0, x0, y0, x0, y0
            if some > 1:
                x1, y1 = x + tokens[i + 1] * x_bytes, y + tokens[i + 1] * y_bytes
            if some > 2:
                x2, y2 = x + tokens[i + 2] * x_bytes, y + tokens[i + 2] * y_bytes
                x3, y3 = x + tokens[i + 3] * x_bytes, y + tokens[i + 3] * y_bytes
            column, part = 0, done
            for s in range(sites):
                if count == 1:
                    mine = low <= part < high
                    part += _cost(own + s * COLUMNS * 8, 1, widths[s:], fan_in, add_bias_only)
                if mine:
                    _apply(
                        ints(own + s * COLUMNS * 8, COLUMNS),
                        x0,
                        x1,
                        x2,
                        x3,
                        y0 + column * 4,
                        y1 + column * 4,
                        y2 + column * 4,
                        y3 + column * 4,
                        some,
                        fan_in,
                        widths[s],
                        0 if bias == 0 else bias + column * 4,
                        h,
                        add_bias_only,
                    )
                column += widths[s]
            done += cost * some
            i += some


def supports_bfloat16(inputs: int, outputs: int) -> bool:
    """Whether A and B of a linear of this size may be in bfloat16."""
    return AVAILABLE and inputs % NARROW_LANES == 0 and outputs % NARROW_LANES == 0


def grouped_affine(
    x: torch.Tensor,  # float32 [T, in], rows contiguous
    y: torch.Tensor,  # float32 [T, all outputs], rows contiguous, changed in place
    tokens: torch.Tensor,  # int64 [n]: which rows of x and y
    slots: torch.Tensor,  # int64 [n]: each token's slot, sorted
    table: torch.Tensor,  # int64 [slots, sites, COLUMNS]
    first: int,  # number of the first site in the table
    widths: Sequence[int],  # outputs of each site, side by side in y
    base_bias: torch.Tensor | None,  # float32 [all outputs]
    *,
    has_matrices: bool = True,  # False: no adapter of the batch has A and B here
    add_bias_only: bool = True,  # False: fused_bias.py has added adapters that are only a bias
) -> None:
    """Add each listed token's adapter to y, at sites that see the same x. CPU, float32. Raises ShapeError."""
    require(len(x) == len(y) and sum(widths) <= y.shape[1], "outputs of other sites or tokens")
    sizes = (tokens.shape[0], x.shape[1], x.stride(0), y.stride(0))
    pointers = (x.data_ptr(), y.data_ptr(), tokens.data_ptr(), slots.data_ptr())
    row = table.data_ptr() + first * COLUMNS * 8
    bias = 0 if base_bias is None else base_bias.data_ptr()
    parallel = has_matrices or tokens.shape[0] * y.shape[1] > SINGLE_THREAD_MAX_OUTPUTS
    _grouped_affine(
        arguments(*sizes, *pointers, row, table.stride(0), bias, add_bias_only, len(widths), *widths),
        parallel=parallel,
    )
