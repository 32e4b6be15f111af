"""h = A x and y += B h of one adapter, for one token or several at once, with loops in LLVM's terms.

Each element of A [r, in] and B^T [r, out] is read once for all tokens of a tile, several ranks at a time: as
many sums as fit into the registers. A sum has the same order in every tile, so a token's result is the same
bit for bit alone and among others, and with weights in bfloat16 as with the same in float32.
"""

from collections.abc import Sequence
from typing import Any

import numba as nb
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.kernels.cpu.llvm_tiles import (
    HAS_AVX512,
    LANES,
    LONG,
    SHORT,
    WORD,
    broadcast,
    fma,
    load,
    mask,
    prefetch,
    sum_loop,
)
from server.kernels.cpu.openmp import floats

TILE_TOKENS = 4 if HAS_AVX512 else 2  # tokens of a tile; those left over run one by one
ONE_RANKS = 8 if HAS_AVX512 else 4  # ranks of a tile for one token; also the prefetch distance in rows
FEW_RANKS = 4 if HAS_AVX512 else 2  # ranks of a tile for TILE_TOKENS
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)


def shrink_tile(tokens: int, ranks: int, item: int = 4) -> Any:
    """tile(h, h_bytes, x0, x1, x2, x3, a, row_bytes, n): h[t, k] = the sum of a[k, :n] * x_t[:n].

    Arguments are addresses; n is a multiple of a vector. Rows of h lie h_bytes apart, rows of a row_bytes.
    `item`: bytes of a weight.
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
                    prefetch(b, b.add(address, b.mul(row, LONG(ONE_RANKS))), near=False)
                added += [fma(b, weights, xs[t], sums[k * len(x) + t]) for t in range(len(x))]
            sums = added
        return sums

    zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * (ranks * len(x))
    added = sum_loop(b, n, LANES * _parts(item), zeros, of_inputs)
    for k in range(ranks):
        for t in range(len(x)):
            place = b.add(b.add(h, b.mul(h_bytes, LONG(t))), LONG(4 * k))
            b.store(_total(b, added[k * len(x) + t]), b.inttoptr(place, _FLOAT.as_pointer()))


def expand_tile(tokens: int, ranks: int, item: int = 4) -> Any:
    """tile(y0, y1, y2, y3, h, h_bytes, b, row_bytes, n): y_t[:n] += sum of h[t, k] * b[k, :n]; see above."""

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
            factors.append(broadcast(b, value, _VECTOR))
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
                    prefetch(b, b.add(address, b.mul(row, LONG(ONE_RANKS))), near=False)
                sums = [fma(b, weights, factors[t * ranks + k], total) for t, total in enumerate(sums)]
            for place, total in zip(places, sums, strict=True):
                b.store(total, b.inttoptr(place, _VECTOR.as_pointer()), align=4)
        return none

    sum_loop(b, n, LANES * _parts(item), [], of_outputs)


def _parts(item: int) -> int:
    """Vectors per iteration: one cache line of weights."""
    return 4 // item


def _weights(b: Any, address: Any, item: int) -> Any:
    """LANES weights as float32; a bfloat16 is the upper half of a float32."""
    if item == 4:
        return load(b, address, _VECTOR)
    halves = load(b, address, ir.VectorType(SHORT, LANES))
    whole = ir.VectorType(WORD, LANES)
    return b.bitcast(b.shl(b.zext(halves, whole), ir.Constant(whole, [16] * LANES)), _VECTOR)


def _total(b: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [b.shuffle_vector(vector, vector, mask(range(at, at + width))) for at in (0, width)]
        vector = b.fadd(*halves)
    return b.extract_element(vector, WORD(0))


_shrink_one, _shrink_few = shrink_tile(1, ONE_RANKS), shrink_tile(TILE_TOKENS, FEW_RANKS)
_shrink_one_rank, _shrink_few_rank = shrink_tile(1, 1), shrink_tile(TILE_TOKENS, 1)
_expand_one, _expand_few = expand_tile(1, ONE_RANKS), expand_tile(TILE_TOKENS, FEW_RANKS)
_expand_one_rank, _expand_few_rank = expand_tile(1, 1), expand_tile(TILE_TOKENS, 1)
_shrink_one_16, _shrink_few_16 = shrink_tile(1, ONE_RANKS, 2), shrink_tile(TILE_TOKENS, FEW_RANKS, 2)
_shrink_one_rank_16, _shrink_few_rank_16 = shrink_tile(1, 1, 2), shrink_tile(TILE_TOKENS, 1, 2)
_expand_one_16, _expand_few_16 = expand_tile(1, ONE_RANKS, 2), expand_tile(TILE_TOKENS, FEW_RANKS, 2)
_expand_one_rank_16, _expand_few_rank_16 = expand_tile(1, 1, 2), expand_tile(TILE_TOKENS, 1, 2)


@nb.njit(cache=True, error_model="numpy")
def _run_shrink(narrow, one, several, h, h_bytes, x0, x1, x2, x3, a, row, n):  # type: ignore[no-untyped-def]
    """Call the tile for `one` token or TILE_TOKENS, for `several` ranks or one."""
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
    """Call the tile for `one` token or TILE_TOKENS, for `several` ranks or one."""
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
    """h[t, :r] = A x_t, with A [r, n]. Arguments are addresses; `tokens` is 1 or TILE_TOKENS: how many x
    there are.

    `item`: bytes of a number of A; if it is 2, n is a multiple of 2 * LANES.
    """
    whole, row, k = n // LANES * LANES, n * item, 0
    at_once = ONE_RANKS if tokens == 1 else FEW_RANKS
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
    """y_t [n] += B h[t, :r], with B^T [r, n]; arguments as of `shrink`."""
    whole, row, k = n // LANES * LANES, n * item, 0
    at_once = ONE_RANKS if tokens == 1 else FEW_RANKS
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
