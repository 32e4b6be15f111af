"""The two products of decode attention for one page and several heads that share it, in LLVM's terms.

A page is read once for all heads of a tile, whose sums stay in registers; the next page, which may lie
anywhere, is prefetched meanwhile. A sum has the same order in every tile: a row's result does not depend on
the other rows of the batch.
"""

from typing import Any

import numba as nb
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.kernels.cpu.llvm_tiles import HAS_AVX512, LANES, LONG, broadcast, fma, load, prefetch, sum_loop

MAX_TILE_HEADS = 4 if HAS_AVX512 else 2  # of a tile
VECTORS = 4 if HAS_AVX512 else 2  # vectors of head_dim in a tile of values
CHAINS = 4  # partial sums of a score, because an addition waits for the one before it
MIN_DIMS = 8  # head_dim is a multiple of this
_FLOAT = ir.FloatType()


def score_tile(heads: int) -> Any:
    """tile(p, p_bytes, q, q_bytes, page, following, dim): p_h[:16] = q_h [dim] times keys [dim, 16].

    Arguments are addresses; heads lie p_bytes and q_bytes apart. dim is a multiple of CHAINS.
    """

    def typed(_context, p, p_bytes, q, q_bytes, page, following, dim):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            _scores(b, heads, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return intrinsic(typed)


def _scores(
    b: Any, heads: int, p: Any, p_bytes: Any, q: Any, q_bytes: Any, page: Any, following: Any, dim: Any
) -> None:
    vector = ir.VectorType(_FLOAT, LANES)
    queries = [b.add(q, b.mul(q_bytes, LONG(h))) for h in range(heads)]

    def of_dims(at: Any, sums: list[Any]) -> list[Any]:
        added = []
        for chain in range(CHAINS):
            d = b.add(at, LONG(chain))
            offset = b.mul(d, LONG(4 * LANES))
            keys = load(b, b.add(page, offset), vector)
            prefetch(b, b.add(following, offset))
            for h in range(heads):
                value = b.load(b.inttoptr(b.add(queries[h], b.mul(d, LONG(4))), _FLOAT.as_pointer()))
                added.append(fma(b, keys, broadcast(b, value, vector), sums[chain * heads + h]))
        return added

    zeros = [ir.Constant(vector, [0.0] * LANES)] * (heads * CHAINS)
    added = sum_loop(b, dim, CHAINS, zeros, of_dims)
    for h in range(heads):
        total = b.fadd(b.fadd(added[h], added[heads + h]), b.fadd(added[2 * heads + h], added[3 * heads + h]))
        place = b.add(p, b.mul(p_bytes, LONG(h)))
        b.store(total, b.inttoptr(place, vector.as_pointer()), align=4)


def value_tile(heads: int, vectors: int, lanes: int) -> Any:
    """tile(out, out_bytes, p, p_bytes, page, following, row_bytes, count): out_h += p_h [count] times values.

    Takes `vectors` times `lanes` dims of out and of the page's values [count, dim], whose rows are row_bytes.
    """

    def typed(_context, out, out_bytes, p, p_bytes, page, following, row, count):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            _values(b, heads, vectors, ir.VectorType(_FLOAT, lanes), *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return intrinsic(typed)


def _values(
    b: Any,
    heads: int,
    vectors: int,
    vector: Any,
    out: Any,
    out_bytes: Any,
    p: Any,
    p_bytes: Any,
    page: Any,
    following: Any,
    row: Any,
    count: Any,
) -> None:
    width = 4 * vector.count
    own = [b.add(out, b.mul(out_bytes, LONG(h))) for h in range(heads)]
    places = [b.add(place, LONG(width * v)) for place in own for v in range(vectors)]
    shares = [b.add(p, b.mul(p_bytes, LONG(h))) for h in range(heads)]

    def of_token(at: Any, sums: list[Any]) -> list[Any]:
        token, later = (b.add(address, b.mul(row, at)) for address in (page, following))
        for v in range(vectors):
            prefetch(b, b.add(later, LONG(width * v)))
        values = [load(b, b.add(token, LONG(width * v)), vector) for v in range(vectors)]
        added = []
        for h in range(heads):
            share = b.load(b.inttoptr(b.add(shares[h], b.mul(at, LONG(4))), _FLOAT.as_pointer()))
            factor = broadcast(b, share, vector)
            added += [fma(b, values[v], factor, sums[h * vectors + v]) for v in range(vectors)]
        return added

    old = [load(b, place, vector) for place in places]
    for place, value in zip(places, sum_loop(b, count, 1, old, of_token), strict=True):
        b.store(value, b.inttoptr(place, vector.as_pointer()), align=4)


_s1, _s2, _s3, _s4 = (score_tile(heads) for heads in (1, 2, 3, 4))
_v1, _v2, _v3, _v4 = (value_tile(heads, VECTORS, LANES) for heads in (1, 2, 3, 4))
_h1, _h2, _h3, _h4 = (value_tile(heads, 1, MIN_DIMS) for heads in (1, 2, 3, 4))


@nb.njit(cache=True, error_model="numpy")
def page_scores(p, p_bytes, q, q_bytes, heads, page, following, dim):  # type: ignore[no-untyped-def]
    """As score_tile, for up to HEADS heads."""
    if heads == 1:
        _s1(p, p_bytes, q, q_bytes, page, following, dim)
    elif heads == 2:
        _s2(p, p_bytes, q, q_bytes, page, following, dim)
    elif heads == 3:
        _s3(p, p_bytes, q, q_bytes, page, following, dim)
    else:
        _s4(p, p_bytes, q, q_bytes, page, following, dim)


@nb.njit(cache=True, error_model="numpy")
def add_page_values(out, out_bytes, p, p_bytes, heads, page, following, count, dim):  # type: ignore[no-untyped-def]
    """out_h [dim] += p_h [count] times the first `count` tokens of a page [16, dim].

    Those beyond are not read: a freed page may hold anything, NaN included.
    """
    row, d = dim * 4, 0
    while d + VECTORS * LANES <= dim:
        if heads == 1:
            _v1(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        elif heads == 2:
            _v2(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        elif heads == 3:
            _v3(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        else:
            _v4(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        d += VECTORS * LANES
    while d < dim:
        if heads == 1:
            _h1(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        elif heads == 2:
            _h2(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        elif heads == 3:
            _h3(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        else:
            _h4(out + d * 4, out_bytes, p, p_bytes, page + d * 4, following + d * 4, row, count)
        d += MIN_DIMS
