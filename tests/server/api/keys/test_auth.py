"""Who gets in: nobody without a key, a tenant to its own, the operator to /admin."""

import re
import socket
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from server.api.http.dependencies import current_tenant
from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, lora_files, upload

PUBLIC = {"/healthz", "/readyz", "/metrics", "/health", "/ping", "/version", "/openapi.json", "/docs"}
OPERATORS = re.compile(r"/admin/|/v1/(un)?load_lora_adapter")


def routes(system: System) -> list[tuple[str, str]]:
    """Every (method, path) that the server answers."""
    found: list[tuple[str, str]] = []

    def walk(items: Any) -> None:
        for item in items:
            router = getattr(item, "original_router", None)
            if router is not None:
                walk(router.routes)
            else:
                assert isinstance(item, APIRoute), item
                found.extend((method, item.path) for method in item.methods or ())

    walk(system.app.routes)
    return found


def filled(path: str) -> str:
    return re.sub(r"{[^}]+}", "x1", path)


def test_every_route_but_health_depends_on_a_key(system: System) -> None:
    found = routes(system)
    assert len(found) > 20
    with system.http() as client:
        for method, path in found:
            answer = client.request(method, filled(path))
            if path in PUBLIC:
                assert answer.status_code in {200, 503}, path
            else:
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"


def test_the_walk_finds_routes_by_their_dependency_too(system: System) -> None:
    """The same by structure: a router without the dependency is a hole, even if it answers 401 today."""

    def depends(dependant: Any) -> bool:
        return dependant.call is current_tenant or any(map(depends, dependant.dependencies))

    def walk(items: Any, inherited: bool) -> None:
        for item in items:
            router = getattr(item, "original_router", None)
            if router is not None:
                walk(router.routes, inherited or any(d.dependency for d in router.dependencies))
            elif item.path not in PUBLIC:
                assert inherited or depends(item.dependant), item.path

    walk(system.app.routes, inherited=False)


def test_a_tenants_key_opens_no_operators_route(system: System, key: str) -> None:
    operators = [(method, path) for method, path in routes(system) if OPERATORS.match(path)]
    assert len(operators) >= 8
    with system.http(key) as client:
        for method, path in operators:
            answer = client.request(method, filled(path), json={"name": "evil"})
            assert answer.status_code == 403, (method, path)
            assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Basic abc",
        "pp-",
        "Bearer wrong",
        "Bearer pp-" + "A" * 43,
        "Bearer pp-" + "é" * 43,
        "Bearer " + "x" * 8192,
    ],
)
def test_a_key_that_is_none_is_401(system: System, value: str) -> None:
    with system.http() as client:
        answer = client.get("/v1/models", headers={b"authorization": value.encode()})
    assert answer.status_code == 401


def test_two_authorization_headers_are_401(system: System, key: str) -> None:
    with system.http() as client:
        headers = [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {system.operator}")]
        assert client.get("/admin/tenants", headers=headers).status_code == 401


def test_a_key_in_the_query_string_is_not_a_key(system: System, key: str) -> None:
    with system.http() as client:
        for name in ("api_key", "key", "token", "access_token", "authorization"):
            assert client.get("/v1/models", params={name: key}).status_code == 401


@pytest.mark.parametrize(
    ("target", "hosts"),
    [
        ("/v1/models", ["x/healthz?"]),
        ("/v1/models", ["a#"]),
        ("/v1/models", ["x/healthz?", "y"]),
        ("/v1/models", ["x/metrics#"]),
        ("//v1/models", ["x"]),
        ("/healthz/../v1/models", ["x"]),
        ("/healthz/%2e%2e/v1/models", ["x"]),
        ("/%2e%2e/admin/tenants", ["x"]),
        ("http://x/healthz?@/v1/models", ["x"]),
        ("/v1/models;/healthz", ["x"]),
        ("/v1%2fmodels", ["x"]),
    ],
)
def test_no_host_and_no_path_trick_opens_a_protected_route(
    system: System, target: str, hosts: list[str]
) -> None:
    host, port = system.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        lines = [f"GET {target} HTTP/1.1", *(f"Host: {h}" for h in hosts), "Connection: close", "", ""]
        raw.sendall("\r\n".join(lines).encode())
        reply = raw.recv(65536)
    status = int(reply.split(b" ", 2)[1])
    assert status in {400, 401, 404} or b'"toy"' not in reply, reply


def test_keys_are_shown_once_and_die_at_once(system: System) -> None:
    with system.http(system.operator) as admin:
        made = admin.post("/admin/tenants", json={"name": "carol"}).json()
        assert made["key"].startswith("pp-")
        url = f"/admin/tenants/{made['id']}"
        second = admin.post(f"{url}/keys").json()
        keys = admin.get(f"{url}/keys").json()["data"]
        assert second["id"] in {key["id"] for key in keys}
        shown = admin.get("/admin/tenants").text + admin.get(f"{url}/keys").text + admin.get(url).text
        assert made["key"] not in shown
        assert second["secret"] not in shown
        with system.http(second["secret"]) as client:
            assert client.get("/v1/models").status_code == 200
            assert admin.delete(f"{url}/keys/{second['id']}").status_code == 200
            assert client.get("/v1/models").status_code == 401
        assert admin.delete(f"{url}/keys/{second['id']}").status_code == 404
        with system.http(made["key"]) as client:
            assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("body", [{}, {"name": ""}, {"name": "x" * 65}, {"name": "a\nb"}, {"x": 1}])
def test_a_tenants_name_is_checked(system: System, body: dict[str, Any]) -> None:
    with system.http(system.operator) as admin:
        assert admin.post("/admin/tenants", json=body).status_code == 400


def stripped(answer: httpx.Response, name: str) -> tuple[int, str]:
    return answer.status_code, answer.text.replace(name, "NAME")


def test_another_tenants_adapter_is_the_same_404_as_no_adapter_on_every_route(
    system: System, key: str, other_key: str, engine: FakeEngine
) -> None:
    """The whole table: each route that names an adapter, asked by B for A's and for nobody's."""
    calls: list[tuple[str, str, Any]] = [
        ("GET", "/v1/adapters/{}", None),
        ("DELETE", "/v1/adapters/{}", None),
        ("GET", "/v1/adapters/{}/versions/1", None),
        ("DELETE", "/v1/adapters/{}/versions/1", None),
        ("GET", "/v1/adapters/{}/versions/1/download", None),
        ("POST", "/v1/adapters/{}/aliases", {"alias": "prod", "version": 1}),
        ("POST", "/v1/adapters/{}/aliases", {"alias": "prod", "weights": {"1": 1, "2": 1}}),
        ("GET", "/v1/adapters/{}/aliases/latest", None),
        ("DELETE", "/v1/adapters/{}/aliases/latest", None),
        ("POST", "/v1/adapters/{}/aliases/latest/rollback", None),
        ("POST", "/v1/adapters/{}/restore", None),
        ("GET", "/v1/adapters/{}/history", None),
        ("POST", "/v1/adapters/{}/pin", None),
        ("GET", "/v1/adapters/{}/pin", None),
        ("GET", "/v1/adapters/{}/limits", None),
        ("PUT", "/v1/adapters/{}/limits", {"max_n": 1}),
        ("GET", "/v1/models/{}", None),
        ("GET", "/v1/models/{}@1", None),
        ("DELETE", "/v1/models/{}", None),
        ("POST", "/v1/completions", {"model": "{}", "prompt": "x"}),
        ("POST", "/v1/completions", {"model": "{}", "prompt": "x", "stream": True}),
        ("POST", "/v1/completions", {"model": "{}@1", "prompt": "x"}),
        ("POST", "/v1/chat/completions", {"model": "{}", "messages": [{"role": "user", "content": "x"}]}),
    ]
    named = {path for _, path in routes(system) if "{name}" in path or "{model" in path}
    asked = {
        path.replace("{}", "{name}").replace("/1", "/{version}").replace("aliases/latest", "aliases/{alias}")
        for _, path, _ in calls
    }
    assert {path for path in named if "{name}" in path} <= asked, "a route is missing from the table"

    with system.http(key) as a, system.http(other_key) as b:
        assert upload(a, "secret-of-a").status_code == 201
        before = a.get("/v1/adapters/secret-of-a").text
        for method, path, body in calls:
            answers = []
            for name in ("secret-of-a", "no-such-one"):
                filled_body = None
                if body is not None:
                    filled_body = {k: v.replace("{}", name) if k == "model" else v for k, v in body.items()}
                answers.append(stripped(b.request(method, path.format(name), json=filled_body), name))
            assert answers[0] == answers[1], path
            assert answers[0][0] == 404, (path, answers[0])
        assert engine.seen == []
        assert a.get("/v1/adapters/secret-of-a").text == before
        for answer in (
            b.get("/v1/adapters"),
            b.get("/v1/adapters", params={"after": "secret"}),
            b.get("/v1/models"),
            b.get("/metrics"),
            b.get("/v1/limits"),
            b.get("/readyz"),
        ):
            assert answer.status_code == 200
            assert "secret-of-a" not in answer.text


def test_the_same_name_is_each_ones_own(system: System, key: str, other_key: str, engine: FakeEngine) -> None:
    body = {"model": "shared-name", "prompt": "x", "temperature": 0}
    with system.http(key) as a, system.http(other_key) as b:
        mine = upload(a, "shared-name", lora_files(1)).json()["digest"]
        theirs = upload(b, "shared-name", lora_files(2)).json()["digest"]
        texts = [client.post("/v1/completions", json=body).json()["choices"][0]["text"] for client in (a, b)]
    assert texts[0] != texts[1]
    assert [row.adapter.digest for row in engine.seen if row.adapter] == [mine, theirs]
    assert len({row.tenant for row in engine.seen}) == 2
