"""The innermost loop of float32_linear.py and int8/ in LLVM's terms: sums that never leave the registers.

For every input, a tile of rows x panels loads one vector of each panel's weights and multiplies it by each
row's value, broadcast over the vector. The processor's own prefetcher stops at each page of 4 KiB, so the
loop prefetches what it reads next.

int8: inputs are pairs of 16 bits, and a multiply-add of pairs is one instruction on x86 (AVX2, AVX-512; with
VNNI it also accumulates); elsewhere plain operations do the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numba as nb
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # outputs of a panel
PANELS_END = 8  # a tile has fewer panels


def features_of(listed: str | None) -> dict[str, bool]:
    """Instruction sets the code may use: those of NUMBA_CPU_FEATURES ("+avx2,-fma"), else all of the
    processor.

    numba compiles for the same list: an instruction used here and not listed would not compile.
    """
    if listed is None:
        return {str(name): bool(here) for name, here in llvm.get_host_cpu_features().items()}
    return {name[1:]: name.startswith("+") for name in listed.split(",")}


FEATURES = features_of(nb.config.CPU_FEATURES)
HAS_AVX512 = bool(FEATURES.get("avx512f", False))
BYTE, SHORT, WORD, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


class Float32:
    """Weights [in, 16] and x [in, rows], float32. Results are added to the output."""

    sums = ir.VectorType(ir.FloatType(), LANES)
    zero, stride = 0.0, 4 * LANES
    near = False  # prefetches into the L1 cache, not the L2 cache

    def weights(self, b: Any, address: Any) -> Any:
        return load(b, address, self.sums)

    def broadcast(self, b: Any, address: Any) -> Any:
        return broadcast(b, b.load(b.inttoptr(address, ir.FloatType().as_pointer())), self.sums)

    def add(self, b: Any, sums: Any, weights: Any, x: Any) -> Any:
        return fma(b, weights, x, sums)

    def store(self, b: Any, sums: Any, place: Any) -> None:
        b.store(b.fadd(b.load(place, align=4), sums), place, align=4)


class Int8:
    """Weights int8 [pairs, 16, 2], x int16 [pairs, rows, 2], sums int32. Results replace the output."""

    sums = ir.VectorType(WORD, LANES)
    zero, stride = 0, 2 * LANES
    near = True
    bytes, shorts = ir.VectorType(BYTE, 2 * LANES), ir.VectorType(SHORT, 2 * LANES)

    def weights(self, b: Any, address: Any) -> Any:
        return b.sext(b.load(b.inttoptr(address, self.bytes.as_pointer()), align=4), self.shorts)

    def broadcast(self, b: Any, address: Any) -> Any:
        pair = b.load(b.inttoptr(address, WORD.as_pointer()), align=4)
        return b.bitcast(broadcast(b, pair, self.sums), self.shorts)

    def add(self, b: Any, sums: Any, weights: Any, x: Any) -> Any:
        return b.add(sums, self._products(b, weights, x))

    def store(self, b: Any, sums: Any, place: Any) -> None:
        b.store(sums, place, align=4)

    def _products(self, b: Any, one: Any, other: Any) -> Any:
        """Of two <32 x i16>, the sum of each pair's two products: <16 x i32>."""
        if FEATURES.get("avx512bw"):
            return call(b, "llvm.x86.avx512.pmaddw.d.512", self.sums, [one, other])
        if FEATURES.get("avx2"):
            half = ir.VectorType(WORD, LANES // 2)
            parts = [
                call(b, "llvm.x86.avx2.pmadd.wd", half, [lanes_of(b, v, span) for v in (one, other)])
                for span in (range(LANES), range(LANES, 2 * LANES))
            ]
            return b.shuffle_vector(*parts, mask(range(LANES)))
        wide = ir.VectorType(WORD, 2 * LANES)
        products = b.mul(b.sext(one, wide), b.sext(other, wide))
        return b.add(*(lanes_of(b, products, range(first, 2 * LANES, 2)) for first in (0, 1)))


def any_tile(generate_tile: Callable[..., None], sizes: Sequence[tuple[int, int]]) -> Any:
    """run(rows, panels, w, x, out, depth, panel_bytes, later, pace), for each (rows, panels) of `sizes`.

    `generate_tile(b, rows, panels, w, ...)` generates the code of one size: out [rows, panels, 16] = x by w's
    panels, over `depth` vectors. Per vector, `pace` bytes of each panel are prefetched, from `later` on.
    """
    assert all(panels < PANELS_END for _, panels in sizes)

    def typed(_context, rows, panels, w, x, out, depth, panel_bytes, later, pace):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            size = b.add(b.mul(args[0], LONG(PANELS_END)), args[1])
            blocks = [b.append_basic_block("tile") for _ in sizes]
            done = b.append_basic_block("tiled")
            switch = b.switch(size, blocks[-1])
            for (rows, panels), block in zip(sizes, blocks, strict=True):
                switch.add_case(LONG(rows * PANELS_END + panels), block)
                b.position_at_end(block)
                generate_tile(b, rows, panels, *args[2:])
                b.branch(done)
            b.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return intrinsic(typed)


def float32_tile(b: Any, rows: int, panels: int, *args: Any) -> None:
    """A tile of Float32; see any_tile."""
    _loop(b, rows, panels, Float32(), *args)


def int8_tile(b: Any, rows: int, panels: int, *args: Any) -> None:
    """A tile of Int8; see any_tile."""
    _loop(b, rows, panels, Int8(), *args)


def _loop(
    b: Any,
    rows: int,
    panels: int,
    kind: Float32 | Int8,
    w: Any,
    x: Any,
    out: Any,
    depth: Any,
    step: Any,
    later: Any,
    pace: Any,
) -> None:
    def of_input(at: Any, sums: list[Any]) -> list[Any]:
        lanes = []
        for p in range(panels):
            panel = b.mul(step, LONG(p))
            lanes.append(kind.weights(b, b.add(b.add(w, panel), b.mul(at, LONG(kind.stride)))))
            prefetch(b, b.add(b.add(later, panel), b.mul(at, pace)), near=kind.near)
        row = b.add(x, b.mul(at, LONG(4 * rows)))
        added = []
        for r in range(rows):
            value = kind.broadcast(b, b.add(row, LONG(4 * r)))
            added += [kind.add(b, sums[r * panels + p], lanes[p], value) for p in range(panels)]
        return added

    zeros = [ir.Constant(kind.sums, [kind.zero] * LANES)] * (rows * panels)
    for i, value in enumerate(sum_loop(b, depth, 1, zeros, of_input)):
        kind.store(b, value, b.inttoptr(b.add(out, LONG(4 * LANES * i)), kind.sums.as_pointer()))


def sum_loop(
    b: Any, count: Any, step: int, sums: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """A loop whose sums stay in registers: body(i, sums) returns the next ones, for i = 0, step, ... < count.

    The body runs at least once. Returns the sums, with the builder positioned after the loop.
    """
    before, loop, done = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    at, running = b.phi(LONG), [b.phi(value.type) for value in sums]
    added = body(at, running)
    upper, last = b.add(at, LONG(step)), b.block  # the body may have loops of its own
    for phi, first, value in zip([at, *running], [LONG(0), *sums], [upper, *added], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, last)
    b.cbranch(b.icmp_signed("<", upper, count), loop, done)
    b.position_at_end(done)
    return added


def load(b: Any, address: Any, vector: Any) -> Any:
    return b.load(b.inttoptr(address, vector.as_pointer()), align=4)


def fma(b: Any, one: Any, other: Any, total: Any) -> Any:
    """one * other + total, of float vectors."""
    return call(b, f"llvm.fma.v{total.type.count}f32", total.type, [one, other, total])


def broadcast(b: Any, value: Any, vector: Any) -> Any:
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, WORD(0))
    return b.shuffle_vector(one, one, mask([0] * vector.count))


def prefetch(b: Any, address: Any, *, near: bool = True) -> None:
    """Prefetch a cache line into the L1 cache, or not `near`, into the L2 cache."""
    hints = [WORD(value) for value in (0, 3 if near else 2, 1)]
    call(b, "llvm.prefetch.p0", ir.VoidType(), [b.inttoptr(address, BYTE.as_pointer()), *hints])


@intrinsic  # type: ignore[untyped-decorator]
def prefetch_line(_context: Any, address: Any) -> Any:  # noqa: ARG001 - numba matches arguments by name
    """Prefetch the cache line at an address, outside of tiles."""

    def generate(context: Any, b: Any, _sig: Any, args: Any) -> Any:
        prefetch(b, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def call(b: Any, name: str, result: Any, args: list[Any]) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def lanes_of(b: Any, vector: Any, chosen: range) -> Any:
    return b.shuffle_vector(vector, vector, mask(chosen))


def mask(lanes: Any) -> Any:
    chosen = list(lanes)
    return ir.Constant(ir.VectorType(WORD, len(chosen)), chosen)
