"""Every route, with every kind of key: what it answers follows from the route's scopes and the key's state.

The routes are the app's own: one that no table of scopes has, or that a rule below does not know, fails here.
"""

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.access import ROUTES, access_to, check_scopes
from server.errors import Forbidden
from server.tenancy.key_terms import ALL_SCOPES, KeyInfo
from server.tenancy.tenant_keys import TenantKeys, new_key_id
from tests.server.api.conftest import System, lora_files, started, upload
from tests.server.api.fine_tuning.training import create, send
from tests.server.api.keys.test_auth import OPERATORS, PUBLIC, filled, routes

Route = tuple[str, str]
EVERY_SCOPE = frozenset(ALL_SCOPES)
# Which scopes open a route, told a second time and by rules: the first that fits. None: only all together.
RULES: list[tuple[str, frozenset[str] | None]] = [
    (r"POST (/v1/(chat/)?completions|/(de)?tokenize)$", frozenset({"inference"})),
    (r"GET (/v1/(models|limits)\b|/tokenizer_info$)", EVERY_SCOPE),
    (r"GET /v1/adapter_uploads", frozenset({"adapters"})),
    (r"GET /v1/adapters", frozenset({"read", "adapters"})),
    (
        r"\w+ /v1/(adapters|adapter_uploads|models|load_lora_adapter|unload_lora_adapter)\b",
        frozenset({"adapters"}),
    ),
    (r"POST /admin/tenants/{tenant_id}/adapters$", frozenset({"adapters"})),
    (r"GET /v1/(files|fine_tuning)\b", frozenset({"read", "fine-tune"})),
    (r"\w+ /v1/(files|uploads|fine_tuning)\b", frozenset({"fine-tune"})),
    (r"GET /(v1/keys|v1/audit|admin)\b", frozenset({"read"})),
    (r"\w+ /(v1/keys|admin)\b", None),
]
CHANGES_NOTHING = re.compile(
    r"GET |POST (/v1/(chat/)?completions|/(de)?tokenize|/v1/uploads/{upload_id}/parts)$"
)
KINDS: list[tuple[str, ...]] = [*((scope,) for scope in ALL_SCOPES), ALL_SCOPES]


def rule(method: str, path: str) -> frozenset[str] | None:
    fitting = [scopes for pattern, scopes in RULES if re.match(pattern, f"{method} {path}")]
    assert fitting, f"{method} {path} is new: say here which scopes open it, and in server/api/access.py"
    return fitting[0]


def opens(scopes: tuple[str, ...], method: str, path: str) -> bool:
    needed = rule(method, path)
    return scopes == ALL_SCOPES if needed is None else bool(needed & set(scopes))


@pytest.fixture(scope="module")
def system(valkey_url: str) -> Iterator[System]:
    with started(valkey_url) as it:
        yield it


@pytest.fixture(scope="module")
def protected(system: System) -> list[Route]:
    found = [route for route in routes(system) if route[1] not in PUBLIC]
    assert len(found) > 60
    return found


def make(system: System, owner: str, scopes: tuple[str, ...], expires: int | None = None) -> tuple[str, str]:
    """Id and secret."""
    keys: TenantKeys = system.app.state.services.tenants
    info = KeyInfo(new_key_id(), int(time.time()), scopes=scopes, expires=expires)
    made, secret = system.call(keys.add_key(owner, info))
    return made.id, secret


@pytest.fixture(scope="module")
def owner(system: System) -> str:
    with system.http(system.operator) as client:
        id_: str = client.post("/admin/tenants", json={"name": "owner"}).json()["id"]
    return id_


def ask(
    system: System, secret: str, asked: list[Route], headers: dict[str, str] | None = None
) -> list[tuple[Route, httpx.Response]]:
    """Each route's answer, from the application itself: thousands of requests need no socket."""
    given = {"authorization": f"Bearer {secret}"} | (headers or {})

    async def answers() -> list[httpx.Response]:
        transport = httpx.ASGITransport(system.app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=given) as client:
            return [
                await client.request(method, filled(path), json=None if method == "GET" else {})
                for method, path in asked
            ]

    return list(zip(asked, system.call(answers()), strict=True))


def test_every_route_is_in_the_table_and_the_table_has_no_other(protected: list[Route]) -> None:
    assert {f"{method} {path}" for method, path in protected} == set(ROUTES)


def test_a_route_that_the_table_does_not_have_takes_a_full_key_and_is_in_the_log() -> None:
    reader = KeyInfo("key_x", 0, scopes=("read", "adapters", "fine-tune"))
    for method, action in (("GET", ""), ("POST", "POST /v1/new"), ("DELETE", "DELETE /v1/new")):
        access = access_to(method, "/v1/new")
        assert access.action == action
        check_scopes(KeyInfo("key_x", 0), access)
        with pytest.raises(Forbidden, match="takes a key with all scopes"):
            check_scopes(reader, access)


def test_every_change_has_a_name_in_the_audit_log(protected: list[Route]) -> None:
    for method, path in protected:
        named = ROUTES[f"{method} {path}"].action
        assert bool(named) != bool(CHANGES_NOTHING.match(f"{method} {path}")), (method, path)
        assert re.fullmatch(r"([a-z_]+\.[a-z_]+)?", named)


@pytest.mark.parametrize("scopes", KINDS, ids="+".join)
@pytest.mark.parametrize("whose", ["tenant", "operator"])
def test_a_key_opens_the_routes_of_its_scopes(
    system: System, protected: list[Route], owner: str, whose: str, scopes: tuple[str, ...]
) -> None:
    _, secret = make(system, owner if whose == "tenant" else "operator", scopes)
    opened = 0
    for (method, path), answer in ask(system, secret, protected):
        if whose == "tenant" and OPERATORS.match(path):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), path
        elif opens(scopes, method, path):
            assert answer.status_code not in (401, 403), (method, path, answer.text)
            assert answer.status_code < 500, (method, path, answer.text)
            opened += 1
        else:
            insufficient(answer, method, path)
    assert opened > 2


def insufficient(answer: httpx.Response, method: str, path: str) -> None:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (answer.status_code, error["type"], error["code"]) == (
        *(403, "permission_error"),
        "insufficient_permissions",
    ), (method, path, answer.text)
    for scope in rule(method, path) or ALL_SCOPES:
        assert scope in error["message"]


@pytest.mark.parametrize("scopes", KINDS, ids="+".join)
@pytest.mark.parametrize("state", ["expired", "revoked", "rotated out", "from elsewhere"])
@pytest.mark.parametrize("whose", ["tenant", "operator"])
def test_a_key_that_has_ended_opens_nothing(
    system: System, protected: list[Route], owner: str, whose: str, state: str, scopes: tuple[str, ...]
) -> None:
    holder = owner if whose == "tenant" else "operator"
    keys: TenantKeys = system.app.state.services.tenants
    if state == "from elsewhere":
        info = KeyInfo(new_key_id(), 0, scopes=scopes, addresses=("10.0.0.0/8", "::/0"))
        id_, secret = info.id, system.call(keys.add_key(holder, info))[1]
    else:
        id_, secret = make(system, holder, scopes, int(time.time()) if state == "expired" else None)
    if state == "revoked":
        system.call(keys.revoke(holder, id_))
    if state == "rotated out":
        system.call(keys.rotate(holder, id_, 0))
    codes = {"expired": "expired_api_key", "from elsewhere": "ip_not_authorized"}
    answers = ask(system, secret, protected)
    for name in ("x-forwarded-for", "forwarded", "x-real-ip"):
        answers += ask(system, secret, protected[:3], {name: "10.1.1.1"})
    for route, answer in answers:
        assert answer.status_code == 401, route
        assert answer.json()["error"]["code"] == codes.get(state, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


def test_another_tenants_objects_are_not_there_on_any_route(
    system: System, protected: list[Route], owner: str
) -> None:
    """Each route that names an object, asked with every scope by B for what A has."""
    a, b = make(system, owner, ALL_SCOPES), system.tenant("other")
    with system.http(a[1]) as mine, system.http(b) as theirs:
        assert upload(mine, "hidden", lora_files()).status_code == 201
        alias = {"alias": "live", "version": 1}
        assert mine.post("/v1/adapters/hidden/aliases", json=alias).status_code == 200
        file = send(mine)
        started_upload = {"bytes": 5, "filename": "f", "mime_type": "x", "purpose": "fine-tune"}
        names = {
            "name": "hidden",
            "model:path": "hidden",
            "version": "1",
            "alias": "live",
            "key_id": a[0],
            "file_id": file,
            "job_id": create(mine, file).json()["id"],
            "tenant_id": owner,
            "upload_id": mine.post("/v1/uploads", json=started_upload).json()["id"],
        }
        before = seen(mine)
        asked = 0
        for method, path in protected:
            if "{" not in path or OPERATORS.match(path):
                continue
            url = re.sub(r"{([^}]+)}", lambda match: names[match[1]], path)
            answer = theirs.request(method, url, **body_for(method, path))
            ours = method == "DELETE" and path.endswith("/pin")  # unpinning what is not there is no error
            assert answer.status_code == (200 if ours else 404), (method, url, answer.text)
            asked += 1
        assert asked > 30
        assert seen(mine) == before


def body_for(method: str, path: str) -> dict[str, Any]:
    if method == "GET":
        return {}
    if path.endswith("/parts"):
        return {"files": {"data": b"x"}}
    if path.endswith("/aliases"):
        return {"json": {"alias": "live", "version": 1}}
    if path == "/v1/uploads/{upload_id}/complete":
        return {"json": {"part_ids": ["part_1"]}}
    if path == "/v1/adapter_uploads/{upload_id}/complete":
        return {"json": {"sha256": {"adapter_config.json": "0" * 64}}}
    if path.endswith("/limits"):
        return {"json": {"max_n": 1}}
    return {"json": {}} if path.endswith("/rotate") else {}


def seen(client: httpx.Client) -> list[str]:
    paths = ("adapters", "adapters/hidden", "adapters/hidden/pin", "files", "fine_tuning/jobs", "keys")
    return [re.sub(r'"last_used_at":\w+', "", client.get(f"/v1/{path}").text) for path in paths]
