from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.models import FAMILIES
from tests.oracles.bench import Bench


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(
    request: pytest.FixtureRequest,
    tiny_models: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Bench]]:
    """Each family's tiny model; steps so small that they cut prompts within blocks and windows."""
    family = request.param
    bench = Bench(
        tiny_models(family),
        tmp_path_factory.mktemp(family),
        threads=1,
        max_batch_tokens=32,
        max_seqs=8,
        kv_bytes=4 << 20,
    )
    yield family, bench
    bench.close()


@pytest.fixture(scope="module")
def real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(smollm2, tmp_path_factory.mktemp("smollm2"), max_batch_tokens=64, kv_bytes=64 << 20)
    yield bench
    bench.close()
