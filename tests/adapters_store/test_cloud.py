"""What only a store over a network can do wrong: answers lost, late, changed; keys that are not good."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import obstore
import pytest

from adapters_store.object_store import cloud
from adapters_store.object_store.circuit_breaker import CircuitBreaker
from adapters_store.object_store.cloud import read_options
from adapters_store.object_store.store import Objects
from server.errors import NotFound, StartupError, StoreError
from tests.fixtures.proxy import Fate, Proxy, proxy
from tests.fixtures.s3 import Weed


@pytest.fixture
def way(weed: Weed) -> Iterator[tuple[Proxy, str]]:
    """The way to the store, and where it begins."""
    with proxy(weed.endpoint) as it:
        yield it


@pytest.fixture
def network(way: tuple[Proxy, str]) -> Proxy:
    return way[0]


@pytest.fixture
def store(weed: Weed, way: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.setitem(cloud.QUICK_TIMEOUTS, "read_timeout", timedelta(seconds=1))
    monkeypatch.setitem(cloud.BULK_TIMEOUTS, "read_timeout", timedelta(seconds=1))
    monkeypatch.setitem(cloud.RETRY, "retry_timeout", timedelta(seconds=2))
    return Objects.open(weed.url(), options=weed.options(way[1]))


@pytest.mark.parametrize("fate", ["lose", "fail after", "conflict", "fail before"])
def test_a_create_whose_answer_is_lost_is_no_conflict_with_itself(
    store: Objects, network: Proxy, fate: Fate
) -> None:
    network.method = "PUT"
    network.fates.extend([fate])
    assert store.create_sync("k", b"mine")
    assert network.seen[0][2] == fate
    assert not store.create_sync("k", b"other")
    assert store.get_sync("k") == b"mine"


@pytest.mark.parametrize("fate", ["lose", "fail after", "silence"])
def test_a_create_that_lost_to_another_is_told_so_even_if_its_answer_is_lost(
    store: Objects, network: Proxy, fate: Fate
) -> None:
    assert store.create_sync("k", b"same")
    network.method = "PUT"
    network.fates.extend([fate])
    assert not store.create_sync("k", b"same")


def test_a_create_that_nobody_can_tell_about_is_an_error_and_not_half_there(
    store: Objects, network: Proxy
) -> None:
    network.fates.append("lose")
    network.fates.extend(["fail before"] * 20)
    with pytest.raises(StoreError):
        store.create_sync("k", b"whole")
    network.fates.clear()
    assert store.get_sync("k") == b"whole"


def test_of_fifty_creates_at_once_one_wins_whatever_happens_to_their_answers(
    store: Objects, network: Proxy
) -> None:
    network.method = "PUT"
    some: list[Fate] = ["pass", "pass", "pass", "lose", "conflict", "fail after"]
    network.fates.extend(some * 20)
    with ThreadPoolExecutor(50) as pool:
        won = list(pool.map(lambda i: store.create_sync("k", b"%d" % i), range(50)))
    assert sum(won) == 1
    assert store.get_sync("k") == b"%d" % won.index(True)


@pytest.mark.parametrize("fate", ["flip", "cut"])
def test_a_byte_that_changed_in_the_store_or_on_its_way_is_never_kept(
    store: Objects, network: Proxy, tmp_path: Path, fate: Fate
) -> None:
    data = bytes(range(256)) * 4096
    store.put_sync("k", data)
    network.fates.extend([fate] * 20)
    with pytest.raises(StoreError):
        store.download_sync("k", tmp_path / "out", hashlib.sha256(data).hexdigest())
    assert list(tmp_path.iterdir()) == []
    network.fates.clear()
    store.download_sync("k", tmp_path / "out", hashlib.sha256(data).hexdigest())
    assert (tmp_path / "out").read_bytes() == data


def test_silence_ends_in_an_error(store: Objects, network: Proxy) -> None:
    network.fates.extend(["silence"] * 20)
    with pytest.raises(StoreError):
        store.get_sync("k")


def test_a_transfer_has_a_deadline(store: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.object_store.store.BULK_SECONDS", -1.0)
    (tmp_path / "in").write_bytes(b"x" * (9 << 20))
    with pytest.raises(StoreError, match="longer than"):
        store.put_sync("k", tmp_path / "in")
    with pytest.raises(NotFound):
        store.head_sync("k")


def test_a_store_that_fails_is_left_alone_until_it_answers_again(
    store: Objects, network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    store.on_call = lambda operation, _seconds, outcome: seen.append((operation, outcome))
    store.breaker = CircuitBreaker(failures := 2)

    def state() -> str:
        return store.breaker.state

    network.fates.extend(["silence"] * 100)
    for _ in range(failures):
        with pytest.raises(StoreError):
            store.head_sync("k")
    assert state() == "open"
    asked = len(network.seen)
    with pytest.raises(StoreError, match="at present"):
        store.head_sync("k")
    assert len(network.seen) == asked
    assert seen == [("head", "failed")] * failures + [("head", "refused")]
    network.fates.clear()
    monkeypatch.setattr(store.breaker, "_clock", lambda: float("inf"))
    with pytest.raises(NotFound):  # the probe: a store that says so answers
        store.head_sync("k")
    assert state() == "closed"
    assert seen[-1] == ("head", "missing")


def test_a_store_without_conditional_writes_is_refused(
    store: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.self_test()
    assert store.list_sync("proof") == []

    put = obstore.put
    monkeypatch.setattr(
        "adapters_store.object_store.store.obstore.put",
        lambda *given, **options: put(*given, **(options | {"mode": None})),
    )
    with pytest.raises(StartupError, match="conditional"):
        store.self_test()
    assert store.list_sync("proof") == []


def test_keys_stay_inside_the_prefix(weed: Weed) -> None:
    inner, outer = weed.open("outer/inner"), weed.open("outer")
    inner.put_sync("a/b", b"x")
    outer.put_sync("innermost/c", b"y")
    assert inner.list_sync("a") == ["a/b"]
    assert outer.list_sync("inner") == ["inner/a/b"]
    with pytest.raises(ValueError, match="key"):
        inner.get_sync("../innermost/c")
    with pytest.raises(NotFound):
        inner.get_sync("innermost/c")


def test_a_wrong_key_is_a_store_error_and_in_no_message(weed: Weed, caplog: pytest.LogCaptureFixture) -> None:
    options = weed.options() | {"secret_access_key": "WRONGSECRET"}
    store = Objects.open(weed.url(), options=options)
    for call in (store.get_sync, store.head_sync, store.delete_sync, lambda key: store.create_sync(key, b"")):
        with pytest.raises(StoreError) as caught:
            call("k")
        assert "WRONGSECRET" not in str(caught.value)
    assert caplog.text
    assert "WRONGSECRET" not in caplog.text
    assert "WRONGSECRET" not in repr(vars(store))


@pytest.mark.parametrize(
    "text",
    [
        '{"endpoint": "http://h:1", "secret_access_key": "a%b"}',
        "[store]\nendpoint = http://h:1\nsecret_access_key = a%b\n",
        "[DEFAULT]\nendpoint: http://h:1\nsecret_access_key: a%b\n",
    ],
)
def test_options_are_read_from_json_and_ini(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    assert read_options(tmp_path / "f") == {"endpoint": "http://h:1", "secret_access_key": "a%b"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"secret_access_key": ["SECRET"]}', "SECRET", "[a]\nx=SECRET\n[b]\n", "\udcff"]
)
def test_other_files_are_refused_without_a_word_of_what_is_in_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StartupError, match="store_config") as caught:
        read_options(tmp_path / "f")
    assert "SECRET" not in str(caught.value)
    with pytest.raises(StartupError, match="store_config"):
        read_options(tmp_path / "none")


@pytest.mark.parametrize(
    "options", [{"nonsense": "SECRET"}, {"bucket": "SECRET"}, {"client_options": "SECRET"}]
)
def test_options_that_are_none_stop_the_start(tmp_path: Path, options: dict[str, str]) -> None:
    (tmp_path / "f").write_text(json.dumps(options))
    with pytest.raises(StartupError, match="store") as caught:
        Objects.open("s3://bucket/prefix", tmp_path / "f")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["s3", "gs", "ftp"])
def test_a_url_with_keys_in_it_is_refused_and_not_repeated(scheme: str) -> None:
    with pytest.raises(StartupError, match="credentials") as caught:
        Objects.open(f"{scheme}://AK:SECRET@bucket/prefix")
    assert "SECRET" not in str(caught.value)


def test_http_is_spoken_only_where_the_endpoint_says_so(weed: Weed) -> None:
    store = Objects.open(weed.url(), options=weed.options(weed.endpoint.replace("http:", "https:")))
    with pytest.raises(StoreError):
        store.get_sync("k")
