from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.fixtures.models import FAMILIES
from tests.oracles.bench import Bench

# Steps so small that they cut prompts within blocks and windows
TINY = {"threads": 1, "max_batch_tokens": 32, "max_seqs": 8, "kv_bytes": 4 << 20}
REAL = {"max_batch_tokens": 64, "kv_bytes": 64 << 20}
Benches = Callable[[Path], Bench]


@pytest.fixture(scope="session")
def _benches(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Benches]:
    """A model's folder -> its bench: one for all files of this folder."""
    made: list[Bench] = []

    @cache
    def get(model: Path) -> Bench:
        settings = REAL if model == smollm2 else TINY
        made.append(Bench(model, tmp_path_factory.mktemp(model.name), **settings))
        return made[-1]

    yield get
    for bench in made:
        bench.close()


def _lent(bench: Bench, folder: Path) -> Iterator[Bench]:
    """For one file: adapters of any names; the base must be what it was when they are gone."""
    bench.folder = folder
    yield bench
    bench.check_base()


@pytest.fixture(scope="module", params=list(FAMILIES))
def tiny(
    request: pytest.FixtureRequest,
    tiny_models: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    _benches: Benches,
) -> Iterator[tuple[str, Bench]]:
    """Each family's tiny model."""
    family = request.param
    for bench in _lent(_benches(tiny_models(family)), tmp_path_factory.mktemp(family)):
        yield family, bench


@pytest.fixture(scope="module")
def real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, _benches: Benches) -> Iterator[Bench]:
    yield from _lent(_benches(smollm2), tmp_path_factory.mktemp("smollm2"))
