"""The tests whose truth may depend on the processor's instructions, with those beyond AVX2 hidden.

    make test-avx2                     PATHS below, as CI's second face
    python -m tests.avx2 [ARGS]        pytest's own arguments; tests named among them replace PATHS

AVX-512, VNNI and AMX are hidden from every library that chooses by what the processor has: so a machine that
has them tests what one without them computes. Where there are none, `make test` has done so; HIDING remains.
"""

import os
import sys
from pathlib import Path

# What computes by the processor's vectors: kernels, the engine's steps, training, an oracle of each method
# on the default base. Not what makes no tensors, and not Triton's kernels, which numpy interprets.
PATHS = (
    "tests/server/kernels/cpu",
    "tests/server/engine/cpu",
    "tests/server/engine/model/test_exactness_check.py",
    "tests/server/engine/test_bfloat16_adapters.py",
    "tests/server/engine/test_combined_adapters.py",
    "tests/server/engine/test_mixed_methods.py",
    "tests/server/engine/test_row_isolation.py",
    "tests/server/engine/test_sampler.py",
    "tests/server/finetune/modeling",
    "tests/server/finetune/training/test_evaluation.py",
    "tests/server/finetune/training/test_run.py",
    "tests/oracles/test_bitfit_peft.py::test_smollm2",
    "tests/oracles/test_bottleneck_adapterhub.py::test_smollm2",
    "tests/oracles/test_ia3_peft.py::test_smollm2",
    "tests/oracles/test_ln_tuning_peft.py::test_smollm2",
    "tests/oracles/test_lora_peft.py::test_smollm2",
    "tests/oracles/test_prefix_peft.py::test_smollm2",
    "tests/oracles/test_prompt_peft.py::test_smollm2",
    "tests/oracles/test_training_peft.py::test_smollm2_takes_the_same_steps",
    "tests/e2e/test_mixed_batch.py",
)
HIDING = ("tests/test_avx2.py::test_nothing_beyond_avx2_is_left",)
WIDER = ("avx512", "avxvnni", "amx")  # names of LLVM's
UP_TO_AVX2 = {
    *("SSE", "SSE2", "SSE3", "SSSE3", "SSE41", "SSE42", "POPCNT", "AVX", "F16C", "FMA3", "AVX2"),
    *("X86_V2", "X86_V3"),
}
SWITCHES = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own operators
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # torch's BLAS
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # torch's other one
    "OPENBLAS_CORETYPE": "Haswell",  # numpy's BLAS
    "NUMBA_CPU_NAME": "haswell",  # server/kernels, with the next
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe",
}


def masked_environment() -> dict[str, str]:
    """This process's environment with everything beyond AVX2 hidden, for a process that starts with it."""
    return {**os.environ, **SWITCHES, "NPY_DISABLE_CPU_FEATURES": " ".join(_numpys_own())}


def _numpys_own() -> list[str]:
    """What numpy's operators use here beyond AVX2. Of a name it does not know or have, numpy warns."""
    from numpy._core._multiarray_umath import (  # type: ignore[import-not-found]
        __cpu_dispatch__,
        __cpu_features__,
    )

    return [name for name in __cpu_dispatch__ if __cpu_features__[name] and name not in UP_TO_AVX2]


def has_more_than_avx2() -> bool:
    """Whether the environment above hides anything of this processor."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return bool(_numpys_own()) or any(features[name] and name.startswith(WIDER) for name in features)


def _paths() -> tuple[str, ...]:
    if has_more_than_avx2():
        return PATHS
    sys.stderr.write(
        "This processor ends at AVX2: `make test` has tested it. Only the hiding is tested here.\n"
    )
    return (*HIDING, "-n0")  # one test: no workers


def main(given: list[str]) -> None:
    """Becomes pytest in that environment."""
    named = any(Path(arg.partition("::")[0]).exists() for arg in given)
    arguments = ["-m", "pytest", *given, *(() if named else _paths())]
    os.execve(sys.executable, [sys.executable, *arguments], masked_environment())


if __name__ == "__main__":
    main(sys.argv[1:])
