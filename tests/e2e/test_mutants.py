"""A few damaged adapters of every method over HTTP: each upload is taken, or refused by a sentence.

Thousands more, without HTTP: tests/server/adapters/loading/test_mutants.py.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import LINEARS
from tests.e2e.serving import Serving, ask, body
from tests.fixtures.adapters import (
    make_bitfit,
    make_bottleneck,
    make_ia3,
    make_ln_tuning,
    make_prefix,
    make_prompt,
)
from tests.fixtures.models import load_model, make_lora
from tests.fixtures.mutants import Mutant, mutate

PROMPT = "What is the capital of France?"
EACH = 8
SECONDS = 2.0  # a second, and as much again for a machine that is busy with the rows beside


@pytest.fixture(scope="module")
def sound(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter a method."""
    root, base = tmp_path_factory.mktemp("sound"), load_model(tiny)
    return {
        "lora": make_lora(base, root / "lora", r=4, target_modules=list(LINEARS)),
        "bottleneck": make_bottleneck(base, root / "bottleneck"),
        "prefix": make_prefix(base, root / "prefix", 5),
        "prompt": make_prompt(base, root / "prompt", 5),
        "bitfit": make_bitfit(base, root / "bitfit", LINEARS),
        "ia3": make_ia3(base, root / "ia3", target_modules=["v_proj"], feedforward_modules=[]),
        "ln_tuning": make_ln_tuning(base, root / "ln", target_modules=["input_layernorm"]),
    }


def test_none_hurts_the_server(
    serving: Serving, http: httpx.Client, sound: dict[str, Path], golden: Callable[..., str]
) -> None:
    verdicts: Counter[int] = Counter()
    expected = golden(None, PROMPT, 40)
    with ThreadPoolExecutor(1) as pool, serving.http(serving.tenant("bystander")) as bystander:
        for method, folder in sound.items():
            for i in range(EACH):
                seed = f"{method} {i}"
                beside = pool.submit(ask, bystander, "llama", PROMPT, 40)
                status = upload(http, f"{method}-{i}", mutate([folder], seed), seed)
                assert beside.result() == expected, seed
                verdicts[status] += 1
                answer = http.post("/v1/completions", json=body(f"{method}-{i}", PROMPT))
                assert answer.status_code == (200 if status == 201 else 404), seed
    assert set(verdicts) <= {201, 413, 415, 400}
    assert min(verdicts[201], verdicts[400]) > EACH
    assert serving.get("/readyz").status_code == 200


def upload(http: httpx.Client, name: str, mutant: Mutant, seed: str) -> int:
    """The answer's status. A refusal is an error object of OpenAI's, without a path in it."""
    files = [
        ("files", ("adapter_config.json", mutant.config)),
        ("files", ("adapter_model.safetensors", mutant.weights)),
    ]
    answer = http.post("/v1/adapters", data={"name": name}, files=files)
    assert answer.elapsed.total_seconds() < SECONDS, (seed, mutant.changes)
    if answer.status_code != 201:
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error", (seed, error)
        assert str(Path.cwd()) not in error["message"], seed
    return answer.status_code
