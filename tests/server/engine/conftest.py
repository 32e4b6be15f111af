"""Engines over tiny models, for this folder's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.engine import Stand


@pytest.fixture
def stand(tiny_models: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Stand]]:
    stands: list[Stand] = []

    def build(family: str, count: int, **settings: Any) -> Stand:
        stands.append(Stand(tiny_models(family), tmp_path / str(len(stands)), count, **settings))
        return stands[-1]

    yield build
    for each in stands:
        each.engine.close()
