"""The operator, and a tenant that it has just made."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.api.conftest import System


@pytest.fixture
def operator(system: System) -> Iterator[httpx.Client]:
    with system.http(system.operator) as client:
        yield client


@pytest.fixture
def tenant(operator: httpx.Client) -> dict[str, Any]:
    made: dict[str, Any] = operator.post("/admin/tenants", json={"name": "keeper"}).json()
    return made
