"""The tests whose truth may depend on the processor's instructions, with those beyond AVX2 hidden.

    make test-avx2                     PATHS below, as CI's second face
    python -m tests.avx2 [ARGS]        pytest's own arguments; paths among them replace PATHS

AVX-512, VNNI and AMX are hidden from every library that chooses by what the processor has, so that a machine
that has them tests what one without them computes. Where there are none, this is a plain run of the same tests.
"""

import os
import sys
from pathlib import Path

import numpy as np

PATHS = (
    "tests/server/kernels",
    "tests/server/engine",
    "tests/server/adapters/methods",
    "tests/server/base",
    "tests/server/finetune/test_trainer.py",
)
"""Kernels, engine, methods, oracles, training and whole answers: not HTTP, stores, tenants, deployment."""

KNOWN_TO_AVX2 = {"SSE", "SSE2", "SSE3", "SSSE3", "SSE41", "POPCNT", "SSE42", "AVX", "F16C", "FMA3", "AVX2", "X86_V2", "X86_V3"}


def numpy_features() -> list[str]:
    """What numpy would dispatch to here beyond AVX2; to name what it does not know or have is an error."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return [name for name in __cpu_dispatch__ if __cpu_features__[name] and name not in KNOWN_TO_AVX2]


ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # torch's BLAS
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",  # numpy's BLAS, which computes the products of Triton's interpreter
    "NUMBA_CPU_NAME": "haswell",  # both: server/kernels
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe",
}
