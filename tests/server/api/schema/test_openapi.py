"""/openapi.json and /docs: complete, without a key, and made of the models that validate."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from server.api.app import ROUTERS
from server.api.generation.chat_bodies import ChatBody
from server.api.routes.docs import Docs
from server.engine.fake import FakeEngine
from server.settings import Settings
from tests.server.api.conftest import System

OPEN = {"/health", "/ping", "/version", "/healthz", "/readyz", "/metrics"}


@pytest.fixture
def anybody(system: System) -> Iterator[httpx.Client]:
    with system.http() as client:
        yield client


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return Docs([module.router for module in ROUTERS]).document


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_is_there(document: dict[str, Any]) -> None:
    routes = {
        (method, getattr(route, "path_format", ""))
        for module in ROUTERS
        for route in module.router.routes
        for method in getattr(route, "methods", ())
    }
    assert operations(document).keys() == routes


def test_a_body_is_the_model_that_validates_it(document: dict[str, Any]) -> None:
    body = operations(document)["POST", "/v1/chat/completions"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatBody"}
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert fields.keys() == ChatBody.model_fields.keys()


def test_every_post_that_reads_something_says_so(document: dict[str, Any]) -> None:
    reads = {path for (method, path), found in operations(document).items() if "requestBody" in found}
    assert {"/v1/files", "/v1/uploads/{upload_id}/parts", "/v1/adapters", "/admin/gc"} <= reads


def test_each_route_has_its_keys_errors_and_headers(document: dict[str, Any]) -> None:
    for (method, path), operation in operations(document).items():
        assert bool(operation["security"]) == (path not in OPEN), path
        answers = operation["responses"]
        assert "422" not in answers, path
        assert {"400", "500", "503"} <= answers.keys(), path
        assert {"401", "403", "404"} <= answers.keys() or path in OPEN, path
        assert "429" in answers or method == "GET", path
        (success,) = [answer for status, answer in answers.items() if status.startswith("2")]
        assert "x-request-id" in success["headers"], path
    rated = document["components"]["responses"]["429-rates"]
    assert {"retry-after", "x-should-retry", "x-ratelimit-limit-tokens"} <= rated["headers"].keys()


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    for kind, name in set(re.findall(r"'#/components/(\w+)/([^']+)'", str(document))):
        assert name in document["components"][kind], name


def test_it_is_served_without_a_key(anybody: httpx.Client, document: dict[str, Any]) -> None:
    answer = anybody.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.json()["paths"].keys() == document["paths"].keys()
    page = anybody.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "<script" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")


def test_errors_match_their_schema(anybody: httpx.Client, document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["Error"]
    for answer in (anybody.get("/x"), anybody.get("/v1/models"), anybody.post("/docs")):
        jsonschema.validate(answer.json(), schema)


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/healthz", "/v1/models", "/openapi.json"])
def test_head_is_where_get_is(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
    assert head.headers["x-request-id"] != get.headers["x-request-id"]


def test_head_of_a_route_without_get_is_405(http: httpx.Client) -> None:
    answer = http.head("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "HEAD" in http.post("/v1/models").headers["allow"]


def test_vllms_health_routes(anybody: httpx.Client, engine: FakeEngine) -> None:
    for answer in (anybody.get("/health"), anybody.get("/ping"), anybody.post("/ping")):
        assert (answer.status_code, answer.content) == (200, b"")
    assert anybody.get("/version").json().keys() == {"version"}


@pytest.mark.parametrize("header", ["api-key", "x-api-key"])
def test_a_key_may_come_in_another_header(anybody: httpx.Client, key: str, header: str) -> None:
    assert anybody.get("/v1/models", headers={header: key}).status_code == 200
    assert anybody.get("/v1/models", headers={header: "wrong"}).status_code == 401
    both = {header: key, "authorization": "Bearer wrong"}
    assert anybody.get("/v1/models", headers=both).status_code == 401
    twice = [(header, key), (header, "other")]
    assert anybody.get("/v1/models", headers=twice).status_code == 401


@pytest.mark.parametrize(
    "origins",
    [
        "https://*.example",
        "https://user@a.example",
        "https://a.example/",
        "https://a.example/path",
        "a.example",
        "null",
        "ftp://a.example",
        "https://a.example, http://",
        "https://a b",
    ],
)
def test_what_is_no_origin_is_refused_at_start(origins: str) -> None:
    with pytest.raises(ValueError, match="is no origin"):
        Settings(allowed_origins=origins)


def test_origins_are_as_browsers_send_them() -> None:
    given = "https://A.example:443, http://localhost:3000,http://[::1]:80 ,https://a.example"
    assert Settings(allowed_origins=given).origins == [
        "https://a.example",
        "http://localhost:3000",
        "http://[::1]",
    ]
    assert Settings(allowed_origins="*").origins == ["*"]
    assert Settings().origins == []
