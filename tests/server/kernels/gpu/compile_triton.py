"""Compile the kernels for a GPU that need not be there: python -m tests.server.kernels.gpu.compile_triton 90

The interpreter takes what the compiler refuses. What is checked beside: that weights, keys and values are
read 16 bytes at a time, though their addresses come out of a table; and that shared memory suffices.
"""

import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.kernels.gpu.decode_attention import _combine, _decode, _write
from server.kernels.gpu.grouped_affine import _expand, _shrink
from server.kernels.gpu.grouped_bottleneck import _down, _up
from server.kernels.gpu.prefill_attention import _chunks
from server.kernels.gpu.rms_norm import _rms_norm
from server.kernels.gpu.rotary import _rotate

SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes a block may have

BF16 = {"DTYPE": tl.bfloat16, "DOT": tl.bfloat16}
BLOCKS = {"SPLITS": 4, **BF16}
AFFINE = {"SITES": 3, "RANKS": 16, **BLOCKS}
WIDTHS = {"OUT0": 4096, "OUT1": 1024, "OUT2": 1024, "HAS_BIAS": True}
BOTTLENECK = {"WIDTHS": 64, **BLOCKS}
PAGES = {"HEADS": 8, "DIM": 128, "WIDE": 128, "PAGE": 16}
PAST = {"GROUP": 4, "KEY_BLOCK": 64, "WINDOW": 0, "SOFTCAP": 0.0, **PAGES, **BF16}
CAPPED = {"WINDOW": 4096, "SOFTCAP": 30.0}

# kernel, its constants, whether all of its large reads must be of 16 bytes
CASES: list[tuple[Any, dict[str, Any], bool]] = [
    (_shrink, {"EMBEDDING": False, "BLOCK": 16, "BLOCK_K": 128, **AFFINE}, True),
    (_shrink, {"EMBEDDING": False, "BLOCK": 64, "BLOCK_K": 64, **AFFINE}, True),
    (_shrink, {"EMBEDDING": True, "BLOCK": 16, "BLOCK_K": 128, **AFFINE, "SITES": 1, "SPLITS": 1}, False),
    (_expand, {"HAS_RANKS": True, "BLOCK": 16, "BLOCK_N": 256, **WIDTHS, **AFFINE}, True),
    (_expand, {"HAS_RANKS": True, "BLOCK": 64, "BLOCK_N": 128, **WIDTHS, **AFFINE}, True),
    (_expand, {"HAS_RANKS": False, "BLOCK": 16, "BLOCK_N": 256, **WIDTHS, **AFFINE}, False),
    (_down, {"BLOCK": 16, "BLOCK_K": 64, **BOTTLENECK}, True),
    (_up, {"BLOCK": 16, "BLOCK_N": 256, "PLAIN": False, **BOTTLENECK}, True),
    (_up, {"BLOCK": 64, "BLOCK_N": 128, "PLAIN": False, **BOTTLENECK}, True),
    (_write, PAGES, False),
    (_decode, {"BLOCK": 16, "SHARES": 4, **PAST}, True),
    (_decode, {"BLOCK": 16, "SHARES": 1, **PAST, **CAPPED}, True),
    (_combine, {"SHARES": 4, "MANY": 4, "DIM": 128, "WIDE": 128, "DTYPE": tl.bfloat16}, False),
    (_rms_norm, {"WIDTH": 4096, "WIDE": 4096, "AROUND_ONE": False, "DTYPE": tl.bfloat16}, False),
    (_rotate, {"HEADS": 32, "KV_HEADS": 8, "DIM": 128, "WIDE": 64, "DTYPE": tl.bfloat16}, False),
    (_chunks, {"BLOCK": 64, **PAST, **CAPPED}, True),
]
FLOATS = {"h": "*fp32", "z": "*fp32", "squares": "*fp32", "parts": "*fp32"}
INTEGERS = {"table", "tables", "order", "blocks", "lengths", "places", "chunks"}
DIVISIBLE = ("_stride", "_token", "_head", "fan_in", "hidden")  # by 16, as in every real model


def compile_kernel(kernel: Any, constants: dict[str, Any], capability: int) -> Any:
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
            continue
        number = name in ("n", "site", "sites", "first_site") or name.endswith(DIVISIBLE)
        if name in ("scale", "epsilon"):
            signature[name] = "fp32"
        elif number:
            signature[name] = "i32"
        elif name == "x" and constants.get("EMBEDDING"):
            signature[name] = "*i64"
        elif name == "h" and kernel in (_down, _up):
            signature[name] = "*bf16"
        else:
            signature[name] = "*i64" if name in INTEGERS else FLOATS.get(name, "*bf16")
        if signature[name].startswith("*") or name.endswith(DIVISIBLE):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def main(capability: int) -> None:
    for kernel, constants, wide in CASES:
        compiled = compile_kernel(kernel, constants, capability)
        name = f"{kernel.__name__} {constants}"
        assert compiled.metadata.shared <= SHARED[capability], name
        narrow = compiled.asm["ptx"].count("ld.global.b16")
        assert not wide or narrow <= 8, f"{narrow} reads of two bytes: {name}"
        assert not wide or "cp.async.cg" in compiled.asm["ptx"], name


if __name__ == "__main__":
    main(int(sys.argv[1]))
