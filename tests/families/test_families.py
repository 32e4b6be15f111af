"""Two dozen families and thirty hostile configs: exact, or refused by name. All of them: sweep.py."""

from collections.abc import Iterator

import pytest

from tests.families.hostile import SEED
from tests.families.verdict import STAGES
from tests.families.workers import Worker

EXACT = (
    "llama",
    "llama:llama3 rope",
    "llama:odd heads",
    "llama:short context",
    "gpt2",
    "qwen2:window",
    "mistral",
    "gemma3_text",
    "gemma4_text",
    "ministral3:short",
    "phi3:longrope",
    "olmo3",
    "glm4",
    "cohere2",
    "gpt_neox",
    "opt",
    "stablelm:head norms",
    "granite:multipliers",
    "granitemoehybrid:dense attention",
    "hunyuan_v1_dense",
)
REFUSED = {
    "diffllama": "attends more than once",
    "doge": "its attention uses attention_mask",
    "granite_swa": "its attention uses s_aux",
    "gpt2:wrong kv heads": "where its config says",
    "gemma4_text:other head size": "its layers differ in head_dim",
    "mixtral": "it is a mixture of experts",
    "mamba": "recurrent",
}
SEEDS = range(30)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_exact(worker: Worker, name: str) -> None:
    worker.begin(name)
    verdict = worker.wait()
    assert (verdict.outcome, verdict.detail) == ("exact", "")
    assert set(verdict.errors) == {*STAGES}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_with_the_reason(worker: Worker, name: str) -> None:
    worker.begin(name)
    verdict = worker.wait()
    assert verdict.outcome == "refused"
    assert REFUSED[name] in verdict.detail


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hostile_config_is_exact_or_refused(worker: Worker, seed: int) -> None:
    worker.begin(f"{SEED}{seed}")
    verdict = worker.wait()
    assert verdict.outcome in ("exact", "refused"), verdict.detail


def test_a_process_that_dies_is_a_verdict(worker: Worker) -> None:
    worker.begin("llama")
    worker.process.kill()
    assert worker.wait().outcome == "dies"
    worker.begin("mixtral")
    assert worker.wait().outcome == "refused"
