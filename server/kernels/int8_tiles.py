"""The innermost loop of kernels/int8.py, written in LLVM's own terms: sums that never leave the registers.

A multiply-add of 16-bit pairs is one instruction on x86 (AVX2, AVX-512, and VNNI adds up as well); elsewhere
the same in plain operations.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # outputs of a panel
AHEAD = 4096  # bytes of the weight, as in kernels/linear.py
_FEATURES = llvm.get_host_cpu_features()
_BYTE, _SHORT, _WORD, _LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SUMS, _BYTES = ir.VectorType(_WORD, LANES), ir.VectorType(_BYTE, 2 * LANES)
_SHORTS = ir.VectorType(_SHORT, 2 * LANES)


def tile(rows: int, panels: int) -> Any:
    """tile(w, x, out, pairs, panel_bytes): out int32 [rows, panels, 16] = x int16 [pairs, rows, 2] by w."""

    def typed(_context: Any, w: Any, x: Any, out: Any, pairs: Any, panel_bytes: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            _loop(b, rows, panels, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return intrinsic(typed)


def _loop(b: Any, rows: int, panels: int, w: Any, x: Any, out: Any, pairs: Any, panel_bytes: Any) -> None:
    before, zeros = b.block, ir.Constant(_SUMS, [0] * LANES)
    loop, done = b.append_basic_block("pair"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    at = b.phi(_LONG)
    at.add_incoming(_LONG(0), before)
    sums = [b.phi(_SUMS) for _ in range(rows * panels)]
    for phi in sums:
        phi.add_incoming(zeros, before)
    lanes = []
    for p in range(panels):
        address = b.add(b.add(w, b.mul(panel_bytes, _LONG(p))), b.mul(at, _LONG(2 * LANES)))
        lanes.append(b.sext(b.load(b.inttoptr(address, _BYTES.as_pointer()), align=4), _SHORTS))
        _prefetch(b, b.add(address, _LONG(AHEAD)))
    row = b.add(x, b.mul(at, _LONG(4 * rows)))
    added = []
    for r in range(rows):
        pair = b.load(b.inttoptr(b.add(row, _LONG(4 * r)), _WORD.as_pointer()), align=4)
        one = b.insert_element(ir.Constant(_SUMS, ir.Undefined), pair, _WORD(0))
        spread = b.bitcast(b.shuffle_vector(one, one, _mask([0] * LANES)), _SHORTS)
        added += [b.add(sums[r * panels + p], _multiply_add(b, lanes[p], spread)) for p in range(panels)]
    following = b.add(at, _LONG(1))
    at.add_incoming(following, loop)
    for phi, value in zip(sums, added, strict=True):
        phi.add_incoming(value, loop)
    b.cbranch(b.icmp_signed("<", following, pairs), loop, done)
    b.position_at_end(done)
    for i, value in enumerate(added):
        b.store(value, b.inttoptr(b.add(out, _LONG(4 * LANES * i)), _SUMS.as_pointer()), align=4)


def _multiply_add(b: Any, one: Any, other: Any) -> Any:
    """Two <32 x i16>: the sum of each pair's two products, <16 x i32>."""
    if _FEATURES.get("avx512bw"):
        return _call(b, "llvm.x86.avx512.pmaddw.d.512", _SUMS, [one, other])
    if _FEATURES.get("avx2"):
        half = ir.VectorType(_WORD, LANES // 2)
        parts = [
            _call(
                b, "llvm.x86.avx2.pmadd.wd", half, [_lanes(b, v, range(at, at + LANES)) for v in (one, other)]
            )
            for at in (0, LANES)
        ]
        return b.shuffle_vector(*parts, _mask(range(LANES)))
    wide = ir.VectorType(_WORD, 2 * LANES)
    products = b.mul(b.sext(one, wide), b.sext(other, wide))
    return b.add(*(_lanes(b, products, range(first, 2 * LANES, 2)) for first in (0, 1)))


def _prefetch(b: Any, address: Any) -> None:
    hints = [_WORD(value) for value in (0, 3, 1)]
    _call(b, "llvm.prefetch.p0", ir.VoidType(), [b.inttoptr(address, _BYTE.as_pointer()), *hints])


def _call(b: Any, name: str, result: Any, args: list[Any]) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _lanes(b: Any, vector: Any, chosen: range) -> Any:
    return b.shuffle_vector(vector, vector, _mask(chosen))


def _mask(lanes: Any) -> Any:
    chosen = list(lanes)
    return ir.Constant(ir.VectorType(_WORD, len(chosen)), chosen)
