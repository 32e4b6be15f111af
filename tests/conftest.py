"""Fixtures live beside what they start: real Valkey and stores in `services`, real models in `models`."""

pytest_plugins = [
    "tests.fixtures.services",
    "tests.fixtures.models",
    "tests.fixtures.jobs",
    "tests.fixtures.s3",
    "tests.fixtures.faults",
]
