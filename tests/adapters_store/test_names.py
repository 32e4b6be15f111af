import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.names import (
    check_alias,
    check_name,
    is_name,
    manifest_key,
    parse_manifest_key,
    version_number,
)
from server.errors import InvalidField

HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "/etc/x",
    "..%2f",
    "a\\b",
    "a\x00",
    "a#b",
    "x" * 4096,
    "-a",
    ".a",
    "a..b",
    "a/b",
    "é",
    "a b",
    "a\n",
    "a:b",
    "a@1",
    "²",
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_with_a_short_sentence(name: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_name(name)
    assert caught.value.param == "name"
    assert len(caught.value.message) < 300
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()


@given(st.text())
def test_a_name_that_passes_is_one_segment_of_a_key(name: str) -> None:
    if is_name(name):
        assert parse_manifest_key(manifest_key("ten_1", name, 7)) == ("ten_1", name, 7)


@pytest.mark.parametrize("alias", ["3", "v3", "007"])
def test_reserved_aliases(alias: str) -> None:
    with pytest.raises(InvalidField, match="version number"):
        check_alias(alias)


def test_version_numbers() -> None:
    read = {
        text: version_number(text)
        for text in ["3", "v3", "00000003", "v", "", "-1", "3.0", "٣", "1" * 9, "v-1"]
    }
    assert read == {"3": 3, "v3": 3, "00000003": 3} | dict.fromkeys(list(read)[3:])


@pytest.mark.parametrize(
    "key", ["tenants/t/blobs/x.json", "tenants/t/adapters/n/x.json", "a", "tenants/t/adapters/n/1"]
)
def test_other_keys_are_no_manifests(key: str) -> None:
    assert parse_manifest_key(key) is None
