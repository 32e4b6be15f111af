"""Fixtures live beside what they start: real Valkey and stores in `services`, real models in `models`."""

from tests.fixtures.gpu import interpret_without_gpu

interpret_without_gpu()
pytest_plugins = ["tests.fixtures.services", "tests.fixtures.models", "tests.fixtures.jobs"]
