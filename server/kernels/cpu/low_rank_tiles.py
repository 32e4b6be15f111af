"""h = A x and y += B h of one adapter, for one token or several at once; the loops are LLVM's own terms.

Of A [r, in] and B^T [r, out] every element is read once for all the tokens of a tile, several ranks at a
time: as many sums as the registers hold. Each sum runs in one order whatever the tile, so a token's result is
the same bit for bit alone and among others, and with weights in bfloat16 as with the same in float32.
"""

from collections.abc import Sequence
from typing import Any

import numba as nb
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.kernels.cpu.llvm_tiles import (
    LANES,
    LONG,
    SHORT,
    WIDE,
    WORD,
    fma,
    load,
    mask,
    prefetch,
    spread,
    summed,
)
from server.kernels.cpu.openmp import floats

TOKENS = 4 if WIDE else 2  # of a tile; the rest of a run comes one by one
RANKS = 8 if WIDE else 4  # of a tile for one token; and so many rows ahead is asked for what comes next
FEWER = 4 if WIDE else 2  # of a tile for TOKENS
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)


def shrink_tile(tokens: int, ranks: int, item: int = 4) -> Any:
    """tile(h, h_bytes, x0, x1, x2, x3, a, row_bytes, n): h[t, k] = the sum of a[k, :n] * x_t[:n].

    Addresses; n is whole vectors. Rows of h lie h_bytes apart, those of a row_bytes.
    """

    def typed(_context, h, h_bytes, x0, x1, x2, x3, a, row, n):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            h, h_bytes, *x, a, row, n = args
            _shrink(b, h, h_bytes, x[:tokens], a, row, n, ranks, item)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return intrinsic(typed)


def _shrink(
    b: Any, h: Any, h_bytes: Any, x: Sequence[Any], a: Any, row: Any, n: Any, ranks: int, item: int
) -> None:
    rows = [b.add(a, b.mul(row, LONG(k))) for k in range(ranks)]

    def of_inputs(at: Any, sums: list[Any]) -> list[Any]:
        for part in range(_parts(item)):
            first = b.add(at, LONG(part * LANES))
            xs = [load(b, b.add(address, b.mul(first, LONG(4))), _VECTOR) for address in x]
            added = []
            for k in range(ranks):
                address = b.add(rows[k], b.mul(first, LONG(item)))
                weights = _weights(b, address, item)
                if part == 0:
                    prefetch(b, b.add(address, b.mul(row, LONG(RANKS))), near=False)
                added += [fma(b, weights, xs[t], sums[k * len(x) + t]) for t in range(len(x))]
            sums = added
        return sums

    zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * (ranks * len(x))
    added = summed(b, n, LANES * _parts(item), zeros, of_inputs)
    for k in range(ranks):
        for t in range(len(x)):
            place = b.add(b.add(h, b.mul(h_bytes, LONG(t))), LONG(4 * k))
            b.store(_total(b, added[k * len(x) + t]), b.inttoptr(place, _FLOAT.as_pointer()))


def expand_tile(tokens: int, ranks: int, item: int = 4) -> Any:
    """tile(y0, y1, y2, y3, h, h_bytes, b, row_bytes, n): y_t[:n] += sum of h[t, k] * b[k, :n]; as above."""

    def typed(_context, y0, y1, y2, y3, h, h_bytes, m, row, n):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            *y, h, h_bytes, m, row, n = args
            _expand(b, y[:tokens], h, h_bytes, m, row, n, ranks, item)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return intrinsic(typed)


def _expand(
    b: Any, y: Sequence[Any], h: Any, h_bytes: Any, m: Any, row: Any, n: Any, ranks: int, item: int
) -> None:
    factors = []
    for t in range(len(y)):
        own = b.add(h, b.mul(h_bytes, LONG(t)))
        for k in range(ranks):
            value = b.load(b.inttoptr(b.add(own, LONG(4 * k)), _FLOAT.as_pointer()))
            factors.append(spread(b, value, _VECTOR))
    rows = [b.add(m, b.mul(row, LONG(k))) for k in range(ranks)]

    def of_outputs(at: Any, none: list[Any]) -> list[Any]:
        for part in range(_parts(item)):
            first = b.add(at, LONG(part * LANES))
            places = [b.add(address, b.mul(first, LONG(4))) for address in y]
            sums = [load(b, place, _VECTOR) for place in places]
            for k in range(ranks):
                address = b.add(rows[k], b.mul(first, LONG(item)))
                weights = _weights(b, address, item)
                if part == 0:
                    prefetch(b, b.add(address, b.mul(row, LONG(RANKS))), near=False)
                sums = [fma(b, weights, factors[t * ranks + k], total) for t, total in enumerate(sums)]
            for place, total in zip(places, sums, strict=True):
                b.store(total, b.inttoptr(place, _VECTOR.as_pointer()), align=4)
        return none

    summed(b, n, LANES * _parts(item), [], of_outputs)


def _parts(item: int) -> int:
    """Vectors of an iteration: a cache line of weights."""
    return 4 // item


def _weights(b: Any, address: Any, item: int) -> Any:
    """LANES of them as float32; a bfloat16 is the upper half of one."""
    if item == 4:
        return load(b, address, _VECTOR)
    halves = load(b, address, ir.VectorType(SHORT, LANES))
    whole = ir.VectorType(WORD, LANES)
    return b.bitcast(b.shl(b.zext(halves, whole), ir.Constant(whole, [16] * LANES)), _VECTOR)


def _total(b: Any, vector: Any) -> Any:
    """The sum of its lanes, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [b.shuffle_vector(vector, vector, mask(range(at, at + width))) for at in (0, width)]
        vector = b.fadd(*halves)
    return b.extract_element(vector, WORD(0))


_shrink_one, _shrink_few = shrink_tile(1, RANKS), shrink_tile(TOKENS, FEWER)
_shrink_one_rank, _shrink_few_rank = shrink_tile(1, 1), shrink_tile(TOKENS, 1)
_expand_one, _expand_few = expand_tile(1, RANKS), expand_tile(TOKENS, FEWER)
_expand_one_rank, _expand_few_rank = expand_tile(1, 1), expand_tile(TOKENS, 1)
_shrink_one_16, _shrink_few_16 = shrink_tile(1, RANKS, 2), shrink_tile(TOKENS, FEWER, 2)
_shrink_one_rank_16, _shrink_few_rank_16 = shrink_tile(1, 1, 2), shrink_tile(TOKENS, 1, 2)
_expand_one_16, _expand_few_16 = expand_tile(1, RANKS, 2), expand_tile(TOKENS, FEWER, 2)
_expand_one_rank_16, _expand_few_rank_16 = expand_tile(1, 1, 2), expand_tile(TOKENS, 1, 2)


@nb.njit(cache=True, error_model="numpy")
def _run_shrink(narrow, one, several, h, h_bytes, x0, x1, x2, x3, a, row, n):  # type: ignore[no-untyped-def]
    """The tile for `one` token or TOKENS of them, for `several` ranks or a single one."""
    if narrow:
        if one and several:
            _shrink_one_16(h, h_bytes, x0, x1, x2, x3, a, row, n)
        elif one:
            _shrink_one_rank_16(h, h_bytes, x0, x1, x2, x3, a, row, n)
        elif several:
            _shrink_few_16(h, h_bytes, x0, x1, x2, x3, a, row, n)
        else:
            _shrink_few_rank_16(h, h_bytes, x0, x1, x2, x3, a, row, n)
    elif one and several:
        _shrink_one(h, h_bytes, x0, x1, x2, x3, a, row, n)
    elif one:
        _shrink_one_rank(h, h_bytes, x0, x1, x2, x3, a, row, n)
    elif several:
        _shrink_few(h, h_bytes, x0, x1, x2, x3, a, row, n)
    else:
        _shrink_few_rank(h, h_bytes, x0, x1, x2, x3, a, row, n)


@nb.njit(cache=True, error_model="numpy")
def _run_expand(narrow, one, several, y0, y1, y2, y3, h, h_bytes, b, row, n):  # type: ignore[no-untyped-def]
    """As above."""
    if narrow:
        if one and several:
            _expand_one_16(y0, y1, y2, y3, h, h_bytes, b, row, n)
        elif one:
            _expand_one_rank_16(y0, y1, y2, y3, h, h_bytes, b, row, n)
        elif several:
            _expand_few_16(y0, y1, y2, y3, h, h_bytes, b, row, n)
        else:
            _expand_few_rank_16(y0, y1, y2, y3, h, h_bytes, b, row, n)
    elif one and several:
        _expand_one(y0, y1, y2, y3, h, h_bytes, b, row, n)
    elif one:
        _expand_one_rank(y0, y1, y2, y3, h, h_bytes, b, row, n)
    elif several:
        _expand_few(y0, y1, y2, y3, h, h_bytes, b, row, n)
    else:
        _expand_few_rank(y0, y1, y2, y3, h, h_bytes, b, row, n)


@nb.njit(cache=True, error_model="numpy")
def shrink(h, h_bytes, x0, x1, x2, x3, tokens, a, r, n, item):  # type: ignore[no-untyped-def]
    """h[t, :r] = A x_t. Addresses; `tokens` is 1 or TOKENS, and tells which x there are.

    `item`: bytes of a number of A; where it is 2, n is a multiple of 2 * LANES.
    """
    whole, row, k = n // LANES * LANES, n * item, 0
    at_once = RANKS if tokens == 1 else FEWER
    while whole and k < r:
        some = at_once if k + at_once <= r else 1
        own = h + k * 4
        _run_shrink(item == 2, tokens == 1, some > 1, own, h_bytes, x0, x1, x2, x3, a + k * row, row, whole)
        k += some
    if whole < n:
        for t in range(tokens):
            x = floats((x0, x1, x2, x3)[t], n)
            sums = floats(h + t * h_bytes, r)
            for k in range(r):
                weights = floats(a + k * row, n)
                total = sums[k] if whole else nb.float32(0)
                for c in range(whole, n):
                    total += weights[c] * x[c]
                sums[k] = total


@nb.njit(cache=True, error_model="numpy")
def expand(y0, y1, y2, y3, tokens, h, h_bytes, b, r, n, item):  # type: ignore[no-untyped-def]
    """y_t += B h[t, :r]; as above, b [r, n]."""
    whole, row, k = n // LANES * LANES, n * item, 0
    at_once = RANKS if tokens == 1 else FEWER
    while whole and k < r:
        some = at_once if k + at_once <= r else 1
        own = h + k * 4
        _run_expand(item == 2, tokens == 1, some > 1, y0, y1, y2, y3, own, h_bytes, b + k * row, row, whole)
        k += some
    if whole < n:
        for t in range(tokens):
            y = floats((y0, y1, y2, y3)[t], n)
            sums = floats(h + t * h_bytes, r)
            for k in range(r):
                weights = floats(b + k * row, n)
                for o in range(whole, n):
                    y[o] += sums[k] * weights[o]
