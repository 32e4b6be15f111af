"""Fixtures live beside what they start: real Valkey and stores in `services`, real models in `models`."""

import pytest

from tests.fixtures.gpu import interpret_without_gpu

interpret_without_gpu()

pytest_plugins = [
    "tests.fixtures.services",
    "tests.fixtures.models",
    "tests.fixtures.jobs",
    "tests.fixtures.s3",
    "tests.fixtures.faults",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of a test that could go on for ever is run."""
    parser.addoption(
        "--load-seconds", type=float, default=12.0, help="tests/deploy: how long the live test's tenants work"
    )
    parser.addoption("--plots", metavar="FOLDER", help="tests/deploy: draw what its Prometheus recorded")
    parser.addoption("--registry-examples", default="25", help="histories that the registry is put through")
