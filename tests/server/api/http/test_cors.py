"""Web pages of other origins: what a browser asks before, and what it needs to show an answer to a page."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, started

PAGE = "https://app.example"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
# what the `openai` client sends from a browser, and Chrome for a server in a private network
ASKED = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,x-stainless-of-tomorrow"


@pytest.fixture(scope="module")
def open_system(valkey_url: str) -> Iterator[System]:
    with started(valkey_url, allowed_origins=f"{PAGE}, http://localhost:3000", docs=False) as it:
        yield it


@pytest.fixture
def page(open_system: System) -> Iterator[httpx.Client]:
    """A page's requests; the operator's key is as good as a tenant's."""
    with open_system.http(open_system.operator) as client:
        client.headers["origin"] = PAGE
        yield client


def preflight(system: System, origin: str, method: str = "POST", **headers: str) -> httpx.Response:
    asked = {"origin": origin, "access-control-request-method": method} | headers
    with system.http() as client:
        return client.options(CHAT, headers=asked)


def test_a_preflight_needs_no_key_and_gets_what_it_asks_for(open_system: System) -> None:
    answer = preflight(
        open_system,
        PAGE,
        **{"access-control-request-headers": ASKED, "access-control-request-private-network": "true"},
    )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-headers"] == ASKED
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert answer.headers["access-control-max-age"] == "7200"
    assert "access-control-allow-credentials" not in answer.headers
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    ("origin", "method"),
    [
        ("https://evil.example", "POST"),
        ("https://app.example.evil", "POST"),
        ("http://app.example", "POST"),
        ("null", "POST"),
        (PAGE, "PATCH"),
        (PAGE, "TRACE"),
    ],
)
def test_a_preflight_from_elsewhere_is_refused(open_system: System, origin: str, method: str) -> None:
    answer = preflight(open_system, origin, method)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cors_refused")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [(CHAT, BODY, 200), (CHAT, BODY | {"stream": True}, 200), (CHAT, {"model": "toy"}, 400), ("/x", {}, 404)],
)
def test_every_answer_can_be_read_by_the_page(
    page: httpx.Client, path: str, body: dict[str, Any], status: int
) -> None:
    answer = page.post(path, json=body)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-request-id", "retry-after", "x-should-retry"} <= set(exposed.split(", "))
    assert answer.headers["x-request-id"].startswith("req_")


def test_an_answer_without_a_key_can_be_read_too(open_system: System) -> None:
    with open_system.http() as client:
        answer = client.post(CHAT, json=BODY, headers={"origin": PAGE})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)


def test_other_pages_get_no_header(page: httpx.Client) -> None:
    answer = page.post(CHAT, json=BODY, headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert "Origin" in answer.headers["vary"]


def test_a_stream_is_not_buffered(page: httpx.Client, open_system: System) -> None:
    open_system.engine.behaviour.step_seconds = 0.2
    try:
        with page.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
            pieces = [piece for piece in answer.iter_raw() if piece]
    finally:
        open_system.engine.behaviour.step_seconds = 0.0
    assert len(pieces) >= 3


def test_the_schema_can_be_off(page: httpx.Client) -> None:
    assert [page.get(path).status_code for path in ("/docs", "/openapi.json")] == [404, 404]


def test_without_the_option_there_is_no_cors(http: httpx.Client, system: System, engine: FakeEngine) -> None:
    answer = preflight(system, PAGE)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    answer = http.post(CHAT, json=BODY, headers={"origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control-")]
