"""The inner loops of vnni_linear.py in LLVM's terms: sums of four products of bytes, one instruction (VNNI).

A group is 64 inputs of a row as integers in -127..127 with their own scale, so that an outlier coarsens no
other group. Weights are stored as w + 128, because the instruction takes one factor unsigned; each sum starts
at -128 times the sum of the group's inputs to compensate. These sums are exact; groups are added in their
order, in float32, in every tile: a row's result is the same bit for bit alone and in any batch.

Rows of a tile are interleaved, a group as bytes [16, rows, 4], then the starts of its sums, int32 [rows],
then its scales, float32 [rows].
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from server.kernels.cpu.int8.quantization import GROUP_INPUTS, MAX_INT8, MIN_GROUP_MAX, UNSIGNED_OFFSET
from server.kernels.cpu.llvm_tiles import (
    BYTE,
    FEATURES,
    LANES,
    LONG,
    WORD,
    broadcast,
    call,
    fma,
    lanes_of,
    load,
    mask,
    prefetch,
    sum_loop,
)

QUADS = GROUP_INPUTS // 4
GROUP_BYTES = GROUP_INPUTS + 8  # of a row
HAS_VNNI = bool(FEATURES.get("avx512vnni") or FEATURES.get("avxvnni"))
MAX_FLOAT32 = 3.4028234663852886e38
_INSTRUCTION = "llvm.x86.avx512.vpdpbusd"
_FLOAT = ir.FloatType()
_FLOATS, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(WORD, LANES)
_BYTES = ir.VectorType(BYTE, 4 * LANES)


def vnni_tile(
    b: Any, rows: int, panels: int, w: Any, x: Any, out: Any, groups: Any, step: Any, later: Any, pace: Any
) -> None:
    """A tile for any_tile (llvm_tiles.py): out [rows, panels, 16] += x by w's panels, float32, over `groups`.

    Weights are uint8 [quads, 16, 4] a panel, `step` bytes apart. Per quad, `pace` bytes of each panel are
    prefetched, from `later` on.
    """

    def of_group(group: Any, none: list[Any]) -> list[Any]:
        block = b.add(x, b.mul(group, LONG(GROUP_BYTES * rows)))

        def of_quad(quad: Any, sums: list[Any]) -> list[Any]:
            at = b.add(b.mul(group, LONG(QUADS)), quad)
            weights = []
            for p in range(panels):
                panel = b.mul(step, LONG(p))
                weights.append(load(b, b.add(b.add(w, panel), b.mul(at, LONG(4 * LANES))), _WORDS))
                prefetch(b, b.add(b.add(later, panel), b.mul(at, pace)))
            inputs = b.add(block, b.mul(quad, LONG(4 * rows)))
            added = []
            for r in range(rows):
                value = _spread_at(b, b.add(inputs, LONG(4 * r)), WORD, _WORDS)
                added += [_dot(b, sums[r * panels + p], weights[p], value) for p in range(panels)]
            return added

        first = []
        for r in range(rows):
            start = _spread_at(b, b.add(block, LONG(GROUP_INPUTS * rows + 4 * r)), WORD, _WORDS)
            first += [start] * panels
        sums = sum_loop(b, LONG(QUADS), 1, first, of_quad)
        for r in range(rows):
            unit = _spread_at(b, b.add(block, LONG((GROUP_INPUTS + 4) * rows + 4 * r)), _FLOAT, _FLOATS)
            for p in range(panels):
                i = r * panels + p
                place = b.add(out, LONG(4 * LANES * i))
                total = fma(b, b.sitofp(sums[i], _FLOATS), unit, load(b, place, _FLOATS))
                b.store(total, b.inttoptr(place, _FLOATS.as_pointer()), align=4)
        return none

    sum_loop(b, groups, 1, [], of_group)


def _spread_at(b: Any, address: Any, kind: Any, vector: Any) -> Any:
    return broadcast(b, b.load(b.inttoptr(address, kind.as_pointer()), align=4), vector)


def _dot(b: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Sums <16 x i32> plus the products of each four bytes."""
    if FEATURES.get("avx512vnni"):
        return call(b, f"{_INSTRUCTION}.512", _WORDS, [sums, unsigned, signed])
    if FEATURES.get("avxvnni"):
        half = ir.VectorType(WORD, LANES // 2)
        parts = [
            call(b, f"{_INSTRUCTION}.256", half, [lanes_of(b, v, span) for v in (sums, unsigned, signed)])
            for span in (range(LANES // 2), range(LANES // 2, LANES))
        ]
        return b.shuffle_vector(*parts, mask(range(LANES)))
    wide = ir.VectorType(WORD, 4 * LANES)
    products = b.mul(b.zext(b.bitcast(unsigned, _BYTES), wide), b.sext(b.bitcast(signed, _BYTES), wide))
    for first in range(4):
        sums = b.add(sums, lanes_of(b, products, range(first, 4 * LANES, 4)))
    return sums


@intrinsic  # type: ignore[untyped-decorator]
def quantize_group(_context: Any, x: Any, block: Any, row: Any, rows: Any) -> Any:  # noqa: ARG001 - by name
    """quantize_group(x, block, row, rows): 64 floats at x as row `row` of the group at `block`, of `rows`
    rows.

    A group that is not finite makes its row NaN.
    """

    def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
        _quantize_group(b, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _quantize_group(b: Any, x: Any, block: Any, row: Any, rows: Any) -> None:
    values = [load(b, b.add(x, LONG(4 * LANES * i)), _FLOATS) for i in range(GROUP_INPUTS // LANES)]
    sizes = [call(b, f"llvm.fabs.v{LANES}f32", _FLOATS, [value]) for value in values]
    finite = [b.fcmp_ordered("<=", size, ir.Constant(_FLOATS, [MAX_FLOAT32] * LANES)) for size in sizes]
    whole = finite[0]
    for more in finite[1:]:
        whole = b.and_(whole, more)
    sound = call(b, f"llvm.vector.reduce.and.v{LANES}i1", ir.IntType(1), [whole])
    top = _max_lane(b, sizes)
    some = b.and_(sound, b.fcmp_ordered(">=", top, _FLOAT(MIN_GROUP_MAX)))
    factor = b.select(some, b.fdiv(_FLOAT(MAX_INT8), b.select(some, top, _FLOAT(1))), _FLOAT(0))
    unit = b.select(some, b.fmul(top, _FLOAT(1 / MAX_INT8)), b.select(sound, _FLOAT(0), _FLOAT(float("nan"))))
    by = broadcast(b, factor, _FLOATS)
    sounds = broadcast(b, sound, ir.VectorType(ir.IntType(1), LANES))
    total = none = ir.Constant(_WORDS, [0] * LANES)
    target = b.add(block, b.mul(row, LONG(4)))
    apart = b.mul(rows, LONG(4))
    for i, value in enumerate(values):
        rounded = call(b, f"llvm.rint.v{LANES}f32", _FLOATS, [b.fmul(value, by)])
        numbers = b.select(sounds, b.fptosi(rounded, _WORDS), none)
        total = b.add(total, numbers)
        quads = b.bitcast(b.trunc(numbers, ir.VectorType(BYTE, LANES)), ir.VectorType(WORD, LANES // 4))
        for j in range(LANES // 4):
            place = b.add(target, b.mul(apart, LONG(i * LANES // 4 + j)))
            b.store(b.extract_element(quads, WORD(j)), b.inttoptr(place, WORD.as_pointer()), align=4)
    sum_ = call(b, f"llvm.vector.reduce.add.v{LANES}i32", WORD, [total])
    place = b.add(target, b.mul(apart, LONG(QUADS)))
    b.store(b.mul(sum_, WORD(-UNSIGNED_OFFSET)), b.inttoptr(place, WORD.as_pointer()), align=4)
    place = b.add(target, b.mul(apart, LONG(QUADS + 1)))
    b.store(unit, b.inttoptr(place, _FLOAT.as_pointer()), align=4)


def _max_lane(b: Any, vectors: list[Any]) -> Any:
    """The largest lane of all vectors; undefined if one is NaN."""
    most = vectors[0]
    for vector in vectors[1:]:
        most = b.select(b.fcmp_ordered(">", vector, most), vector, most)
    width = LANES
    while width > 1:
        width //= 2
        one, other = (lanes_of(b, most, range(at, at + width)) for at in (0, width))
        most = b.select(b.fcmp_ordered(">", other, one), other, one)
    return b.extract_element(most, WORD(0))
