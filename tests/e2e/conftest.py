"""The whole system, nothing faked, mostly on a tiny random model: it starts in seconds."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.e2e.serving import Serving, polypeft
from tests.fixtures.models import Oracle, greedy, load_model, make_lora
from tests.fixtures.workers import WORKER
from tests.waiting import until

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# one core for the engine: the other is the tests'
OPTIONS = ("--threads", "1", "--kv-bytes", str(32 << 20))


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """For PEFT in this process: the engine needs the other core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _trainings_take_their_share() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Serving, "program", polypeft(WORKER))
        yield


@pytest.fixture(scope="session")
def tiny(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="session")
def serving(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all tests that leave it as it was. Its end is a test as well."""
    it = Serving(str(tiny), tmp_path_factory.mktemp("serving"), *OPTIONS)
    try:
        it.start()
        yield it
        it.stop()
    finally:
        it.end()


@pytest.fixture(scope="session")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """seed -> a LoRA of the tiny model as PEFT saved it: three ranks, different targets, plain or rsLoRA."""
    base, root = load_model(tiny), tmp_path_factory.mktemp("loras")

    @cache
    def get(seed: int) -> Path:
        targets = list(LINEARS[seed % 3 :])
        return make_lora(
            base,
            root / str(seed),
            seed=seed,
            r=(2, 4, 8)[seed % 3],
            target_modules=targets,
            use_rslora=seed % 2 == 1,
        )

    return get


@pytest.fixture(scope="session")
def golden(tiny: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    """(adapter folder or None, prompt, n) -> what PEFT answers, greedily and alone, as text."""
    oracle = Oracle(tiny)

    def get(adapter: Path | None, prompt: str, n: int = 16) -> str:
        with oracle.using(adapter) as model:
            tokens, _ = greedy(model, tokenizer.encode(prompt), n)
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    return get


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny)


@pytest.fixture
def key(serving: Serving, request: pytest.FixtureRequest) -> str:
    """Of a tenant of this test's own."""
    return serving.tenant(request.node.name[:40])


@pytest.fixture
def http(serving: Serving, key: str) -> Iterator[httpx.Client]:
    with serving.http(key) as client:
        yield client


@pytest.fixture(scope="session")
def _mortal(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    small = ("--adapter-slots", "4", "--adapter-ram-bytes", str(1 << 20))
    it = Serving(str(tiny), tmp_path_factory.mktemp("mortal"), *OPTIONS, *small)
    try:
        yield it
        if it.running:
            it.stop()
    finally:
        it.end()


@pytest.fixture
def mortal(_mortal: Serving) -> Serving:
    """A server whose processes may be killed: running and ready, whatever the test before did to it.

    It has four slots on the device, and less RAM than 32 adapters take.
    """
    if not _mortal.running:
        _mortal.start()
    until(_mortal.ready, _mortal.log)
    return _mortal
