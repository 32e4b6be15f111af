"""Fixtures live beside what they start: real Valkey and stores in `services`, real models in `models`."""

from functools import cache

import httpx
import hypothesis
import pytest

from tests.fixtures.gpu import interpret_without_gpu

interpret_without_gpu()
# Each client of httpx reads all certificates, in 50 ms; no test speaks TLS, and one asks again and again.
httpx._transports.default.create_ssl_context = cache(  # type: ignore[attr-defined]
    httpx.create_ssl_context
)
# No test asserts a time, so none has a deadline either: an example that builds a tokenizer takes longer.
hypothesis.settings.register_profile("polypeft", deadline=None)
hypothesis.settings.load_profile("polypeft")

pytest_plugins = [
    "tests.fixtures.services",
    "tests.fixtures.models",
    "tests.fixtures.jobs",
    "tests.fixtures.s3",
    "tests.fixtures.faults",
]


# The slowest, slowest first: a worker that is given one last would be the only one still at work.
FIRST = (
    "tests/e2e/chaos/test_finetune_kills.py",
    "tests/e2e/",
    "tests/deploy/test_live.py",
    "tests/server/engine/cuda/",
    "tests/oracles/",
    "tests/test_avx2.py",
    "tests/server/supervisor/",
    "tests/server/finetune/",
    "tests/server/adapters/loading/",
    "tests/server/engine/",
    "tests/server/cli/",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In files' own order, which workers keep (Makefile), but for FIRST."""
    ranks = {place: rank for rank, place in enumerate(FIRST)}

    def rank(item: pytest.Item) -> int:
        return min((ranks[place] for place in FIRST if item.nodeid.startswith(place)), default=len(FIRST))

    items.sort(key=rank)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of a test that could go on for ever is run."""
    parser.addoption(
        "--load-seconds", type=float, default=12.0, help="tests/deploy: how long the live test's tenants work"
    )
    parser.addoption("--plots", metavar="FOLDER", help="tests/deploy: draw what its Prometheus recorded")
    parser.addoption("--mutants", type=int, default=600, help="damaged adapters of each method")
    parser.addoption("--registry-examples", default="25", help="histories that the registry is put through")
