"""The declarations of every metric: sound names, and a page that says what they say."""

import re
from collections import Counter
from pathlib import Path

import pytest

from server.metrics.docs import with_tables
from server.metrics.engine_names import ENGINE
from server.metrics.family import Family
from server.metrics.labels import OPEN
from server.metrics.names import API, FAMILIES, FLEET, SHARED, WORKER

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def test_the_page_is_made_from_the_declarations() -> None:
    text = PAGE.read_text()
    assert text == with_tables(text)


def test_names_and_keys_stand_once() -> None:
    assert len(FAMILIES) == sum(map(len, (ENGINE, API, FLEET, SHARED, WORKER)))
    assert max(Counter(family.shown for family in FAMILIES.values()).values()) == 1


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_sound(family: Family) -> None:
    assert re.fullmatch(r"(vllm:|polypeft_)[a-z0-9_]+", family.name)
    assert family.help
    assert (family.kind == "histogram") == bool(family.buckets)
    assert list(family.buckets) == sorted(set(family.buckets))
    for label, values in family.all_labels.items():
        assert values or label in OPEN, f"{label} is bounded by nothing"
