"""/v1/keys and /admin/tenants/{id}/keys: to make, limit, rotate and revoke keys; and all that is refused."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from redis import Redis as SyncRedis

from server.api.__main__ import trusted_networks
from server.errors import StartupError
from server.tenancy.key_terms import ALL_SCOPES
from server.tenancy.tenant_keys import MAX_KEYS
from tests.server.api.conftest import System, started

YEAR = 365 * 86_400
OPERATORS_KEYS = "/admin/tenants/operator/keys"


@pytest.fixture
def http(system: System, tenant: dict[str, Any]) -> Iterator[httpx.Client]:
    """With the tenant's first key, which has all scopes."""
    with system.http(tenant["key"]) as client:
        yield client


def works(system: System, secret: str, path: str = "/v1/models") -> bool:
    with system.http(secret) as client:
        status = client.get(path).status_code
    assert status in (200, 401)
    return status == 200


def made(client: httpx.Client, path: str = "/v1/keys", **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 201, answer.text
    key: dict[str, Any] = answer.json()
    return key


def test_a_key_without_terms_may_do_all(system: System, http: httpx.Client) -> None:
    for body in (None, {}, {"name": None, "scopes": None}):
        key = http.post("/v1/keys", json=body).json()
        assert works(system, key["secret"])
        assert key["scopes"] == list(ALL_SCOPES)
        assert (key["name"], key["expires_at"], key["addresses"], key["overlap_until"]) == (
            "",
            None,
            [],
            None,
        )


def test_terms_are_shown_and_the_secret_is_not(http: httpx.Client) -> None:
    key = made(http, name="CI", scopes=["read", "adapters"], expires_in=3600, addresses=["127.0.0.0/8"])
    [listed] = [one for one in http.get("/v1/keys").json()["data"] if one["id"] == key["id"]]
    assert listed == {name: value for name, value in key.items() if name != "secret"}
    assert (key["name"], key["scopes"]) == ("CI", ["adapters", "read"])
    assert 3500 < key["expires_at"] - time.time() <= 3600
    assert key["addresses"] == ["127.0.0.0/8"]


FAR = "expires_at must be within ten years, not"
ADDRESSES = "addresses must be networks from their first address on, such as 10.0.0.0/8 or 2001:db8::/32, not"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"expires_at": 1}, "expires_at 1 is in the past."),
    ({"expires_at": -1}, "expires_at should be greater than or equal to 0, not -1."),
    ({"expires_at": 1.5}, "expires_at should be a valid integer"),
    ({"expires_at": "tomorrow"}, "expires_at should be a valid integer"),
    ({"expires_at": 10**30}, "expires_at should be less than or equal to"),
    ({"expires_at": 253_402_300_799}, f"{FAR} 253402300799."),
    ({"expires_in": 0}, "expires_in should be greater than or equal to 1, not 0."),
    ({"expires_in": 11 * YEAR}, "expires_in should be less than or equal to"),
    ({"expires_in": True}, "expires_in should be a valid integer"),
    ({"expires_in": 60, "expires_at": 10**10}, "expires_at and expires_in exclude each other."),
    ({"scopes": []}, "scopes must name at least one of inference, adapters, fine-tune, read."),
    ({"scopes": ["admin"]}, "scopes must be among inference, adapters, fine-tune, read, not 'admin'."),
    ({"scopes": ["Read"]}, "not 'Read'."),
    ({"scopes": ["x" * 10_000]}, "not 'xxx"),
    ({"scopes": ["read"] * 10_000}, "the number of entries of scopes must be at most 4, not 10000."),
    ({"scopes": "read"}, "scopes should be a valid list"),
    ({"scopes": [["read"]]}, "should be a valid string"),
    ({"scopes": {"read": True}}, "scopes should be a valid list"),
    ({"name": "x" * 10_000}, "name 'xxx"),
    ({"name": "a\nb"}, r"name 'a\nb' must have at most 64 printable characters."),
    ({"name": "a\x00"}, r"name 'a\x00' must have"),
    ({"name": "\u202egnp"}, r"name '\u202egnp' must have"),
    ({"name": 5}, "name should be a valid string"),
    ({"addresses": ["10.0.0.0/33"]}, f"{ADDRESSES} '10.0.0.0/33'."),
    ({"addresses": ["10.0.0.5/8"]}, f"{ADDRESSES} '10.0.0.5/8'."),
    ({"addresses": ["10.0.0"]}, f"{ADDRESSES} '10.0.0'."),
    ({"addresses": ["010.0.0.0/8"]}, f"{ADDRESSES} '010.0.0.0/8'."),
    ({"addresses": ["localhost"]}, f"{ADDRESSES} 'localhost'."),
    ({"addresses": ["::ffff:10.0.0.5/104"]}, f"{ADDRESSES} '::ffff:10.0.0.5/104'."),
    ({"addresses": ["fe80::1%eth0"]}, f"{ADDRESSES} 'fe80::1%eth0'."),
    ({"addresses": ["*"]}, f"{ADDRESSES} '*'."),
    ({"addresses": [""]}, f"{ADDRESSES} ''."),
    ({"addresses": ["1" * 10_000]}, f"{ADDRESSES} '111"),
    ({"addresses": ["10.0.0.0/8"] * 33}, "the number of entries of addresses must be at most 32, not 33."),
    ({"addresses": "10.0.0.0/8"}, "addresses should be a valid list"),
    ({"secret": "pp-mine"}, "'secret' is not a field of this request."),
    ({"id": "key_1"}, "'id' is not a field of this request."),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=[f"{str(body)[:40]}" for body, _ in BAD])
def test_wrong_terms_are_a_sentence(http: httpx.Client, body: dict[str, Any], said: str) -> None:
    before = http.get("/v1/keys").json()["data"]
    answer = http.post("/v1/keys", json=body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]
    assert len(answer.json()["error"]["message"]) < 300
    assert len(http.get("/v1/keys").json()["data"]) == len(before)


def test_a_huge_body_and_a_huge_key_cost_nothing(system: System, http: httpx.Client) -> None:
    assert http.post("/v1/keys", content=b"[" * (5 << 20)).status_code == 413
    many = b'{"scopes": [' + b'"read",' * 100_000 + b'"read"]}'
    assert http.post("/v1/keys", content=many).status_code == 400
    with httpx.Client(base_url=system.url, timeout=30) as client:
        for secret in ("pp-" + "x" * 60_000, "pp-" + "x" * (1 << 20)):
            try:
                status = client.get("/v1/models", headers={"authorization": f"Bearer {secret}"}).status_code
            except httpx.TransportError:  # the head is refused while it is sent
                continue
            assert status in (401, 431)


def test_addresses_are_stored_in_one_form(http: httpx.Client) -> None:
    given = ["::ffff:10.0.0.0/104", "10.0.0.0/8", "192.168.1.7", "2001:DB8:0::/32", "::1"]
    assert made(http, addresses=given)["addresses"] == [
        *("10.0.0.0/8", "192.168.1.7/32"),
        *("2001:db8::/32", "::1/128"),
    ]


def test_a_key_works_from_its_addresses_alone(system: System, http: httpx.Client) -> None:
    assert works(system, made(http, addresses=["10.0.0.0/8", "127.0.0.1"])["secret"])
    assert works(system, made(http, addresses=["::ffff:127.0.0.0/104"])["secret"])
    elsewhere = made(http, addresses=["10.0.0.0/8", "::/0"])["secret"]
    with system.http(elsewhere) as client:
        for spoofed in ("x-forwarded-for", "x-real-ip", "forwarded", "x-client-ip", "cf-connecting-ip"):
            answer = client.get("/v1/models", headers={spoofed: "10.0.0.1"})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "ip_not_authorized"
            assert answer.json()["error"]["message"] == "The API key may not be used from '127.0.0.1'."


def test_a_trusted_proxy_tells_the_address_and_another_does_not(valkey_url: str) -> None:
    with started(valkey_url, trusted_proxies="127.0.0.0/8, 10.9.0.0/16") as system:
        secret = system.tenant("behind")
        with system.http(secret) as client:
            limited = made(client, addresses=["10.0.0.0/16"])["secret"]
        answers = {
            "10.0.0.7": 200,
            "9.9.9.9, 10.0.0.7": 200,  # what the client claims stands left of what the proxy saw
            "10.0.0.7, 9.9.9.9": 401,
            "10.0.0.7, 10.9.1.1": 200,  # through two proxies
            "10.0.0.7, 9.9.9.9, 10.9.1.1": 401,
            "10.0.0.7:5000": 200,
            "::ffff:10.0.0.7": 200,
            "": 401,
            "no address": 401,
            "10.0.0.7x": 401,
        }
        with system.http(limited) as client:
            for forwarded, status in answers.items():
                answer = client.get("/v1/models", headers={"x-forwarded-for": forwarded})
                assert answer.status_code == status, forwarded
            assert client.get("/v1/models").status_code == 401


def test_a_rotated_key_has_two_secrets_for_a_while(system: System, http: httpx.Client) -> None:
    key = made(http, name="rolled", scopes=["inference", "read"])
    path = f"/v1/keys/{key['id']}/rotate"
    new = http.post(path, json={"overlap_seconds": 600}).json()
    assert (new["id"], new["name"], new["scopes"]) == (key["id"], "rolled", ["inference", "read"])
    assert 500 < new["overlap_until"] - time.time() <= 600
    assert works(system, key["secret"])
    assert works(system, new["secret"])

    again = http.post(path)  # an hour of overlap by default: a third secret would end the first
    assert again.status_code == 409
    assert "was rotated before" in again.json()["error"]["message"]
    assert works(system, key["secret"])

    last = http.post(path, json={"overlap_seconds": 0}).json()
    assert last["overlap_until"] is None
    assert [works(system, each["secret"]) for each in (key, new, last)] == [False, False, True]
    assert http.delete(f"/v1/keys/{key['id']}").status_code == 200
    assert not works(system, last["secret"])
    assert http.post(path).status_code == 404


def test_an_overlap_ends(system: System, http: httpx.Client) -> None:
    key = made(http)
    new = http.post(f"/v1/keys/{key['id']}/rotate", json={"overlap_seconds": 1}).json()
    end = time.monotonic() + 60
    while works(system, key["secret"]):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert works(system, new["secret"])
    newest = http.post(f"/v1/keys/{key['id']}/rotate", json={"overlap_seconds": 60}).json()
    assert works(system, newest["secret"])
    assert works(system, new["secret"])


@pytest.mark.parametrize("seconds", [-1, 31 * 86_400, 1.5, "60", True])
def test_a_wrong_overlap_is_a_sentence(http: httpx.Client, seconds: Any) -> None:
    key = made(http)
    answer = http.post(f"/v1/keys/{key['id']}/rotate", json={"overlap_seconds": seconds})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("overlap_seconds should be")


@pytest.mark.parametrize("overlap", [0, 600])
def test_of_two_rotations_at_once_one_wins_and_the_key_goes_on(
    system: System, http: httpx.Client, overlap: int
) -> None:
    key = made(http)
    path = f"/v1/keys/{key['id']}/rotate"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: http.post(path, json={"overlap_seconds": overlap}), range(8)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    secrets = [answer.json()["secret"] for answer in answers if answer.status_code == 200]
    assert sum(works(system, secret) for secret in secrets) == 1
    assert works(system, key["secret"]) == bool(overlap)
    assert len(secrets) == 1 or not overlap


def test_a_tenant_makes_no_key_above_its_own(system: System, http: httpx.Client) -> None:
    with system.http(made(http, scopes=["adapters", "read"])["secret"]) as limited:
        for answer in (limited.post("/v1/keys"), limited.post("/v1/keys", json={"scopes": ["read"]})):
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "insufficient_permissions"
    forever = made(http)
    short = made(http, expires_in=3600, addresses=["127.0.0.0/8"])
    with system.http(short["secret"]) as client:
        fitting: dict[str, Any] = {"expires_in": 60, "addresses": ["127.0.0.1"]}
        assert works(system, made(client, **fitting)["secret"])
        for body in (
            *({}, {"expires_in": 60}, {"addresses": ["127.0.0.1"]}, fitting | {"expires_in": 7200}),
            *(fitting | {"addresses": ["127.0.0.0/7"]}, fitting | {"addresses": ["::1"]}),
        ):
            answer = client.post("/v1/keys", json=body)
            assert answer.status_code in (403, 400), body
        rotated = client.post(f"/v1/keys/{forever['id']}/rotate")
        assert rotated.status_code == 403
        assert "a longer life than this key" in rotated.json()["error"]["message"]
        assert client.post(f"/v1/keys/{short['id']}/rotate").status_code == 200


def test_tenants_keys_are_bounded_and_expired_ones_make_room(
    system: System, http: httpx.Client, tenant: dict[str, Any], valkey_url: str
) -> None:
    first = made(http, expires_in=1)
    for _ in range(MAX_KEYS - 2):
        made(http)
    end = time.monotonic() + 60
    while works(system, first["secret"]):
        assert time.monotonic() < end
        time.sleep(0.1)
    kept = made(http, name="in its place")
    answer = http.post("/v1/keys")
    assert answer.status_code == 429
    assert answer.json()["error"]["message"] == f"A tenant may have {MAX_KEYS} keys; revoke one first."
    keys = http.get("/v1/keys").json()["data"]
    assert len(keys) == MAX_KEYS
    assert kept["id"] in [key["id"] for key in keys]
    assert http.get("/v1/limits").json()["max_keys_per_tenant"] == MAX_KEYS
    with system.http(system.operator) as operator:
        for key in keys:
            assert operator.delete(f"/admin/tenants/{tenant['id']}/keys/{key['id']}").status_code == 200
    with SyncRedis.from_url(valkey_url) as redis:
        left = [owner for owner in redis.hvals("pp:keys") if owner.startswith(tenant["id"].encode())]
    assert not left, "a secret's hash outlives its key"


def test_the_last_use_is_told(system: System, http: httpx.Client) -> None:
    key = made(http)
    tenants = system.app.state.services.tenants

    def last_used() -> Any:
        system.call(tenants.write_last_used())
        return next(one for one in http.get("/v1/keys").json()["data"] if one["id"] == key["id"])[
            "last_used_at"
        ]

    assert last_used() is None
    assert works(system, key["secret"])
    assert abs(last_used() - time.time()) < 60
    http.delete(f"/v1/keys/{key['id']}")
    tenants.note_use("ten_x", key["id"])
    system.call(tenants.write_last_used())


def test_a_key_of_an_earlier_version_works_and_can_be_managed(
    system: System, http: httpx.Client, tenant: dict[str, Any], valkey_url: str
) -> None:
    """Its record has neither terms nor, beside its hash, an id."""
    key = made(http)
    with SyncRedis.from_url(valkey_url) as redis:
        [sha256] = [h for h, owner in redis.hgetall("pp:keys").items() if owner.endswith(key["id"].encode())]
        record = f'{{"info":{{"id":"{key["id"]}","created":1796022719}},"sha256":"{sha256.decode()}"}}'
        redis.hset(f"pp:tenants:{tenant['id']}:keys", key["id"], record)
        redis.hset("pp:keys", sha256, tenant["id"])
        assert works(system, key["secret"])
        assert redis.hget("pp:keys", sha256) == f"{tenant['id']} {key['id']}".encode()
    [shown] = [one for one in http.get("/v1/keys").json()["data"] if one["id"] == key["id"]]
    assert shown["scopes"] == list(ALL_SCOPES)
    assert http.delete(f"/v1/keys/{key['id']}").status_code == 200
    assert not works(system, key["secret"])


def test_the_operator_has_several_keys(
    system: System, operator: httpx.Client, tenant: dict[str, Any]
) -> None:
    dashboard = made(operator, OPERATORS_KEYS, name="dashboard", scopes=["read"])
    second = made(operator, OPERATORS_KEYS, name="on call")
    listed = {key["id"]: key["name"] for key in operator.get(OPERATORS_KEYS).json()["data"]}
    assert listed.items() >= {"operator": "admin.key", dashboard["id"]: "dashboard"}.items()
    with system.http(dashboard["secret"]) as reader:
        assert reader.get("/admin/tenants").status_code == 200
        for refused in (
            reader.post("/admin/tenants", json={"name": "evil"}),
            reader.post(OPERATORS_KEYS),
            reader.delete(f"{OPERATORS_KEYS}/{second['id']}"),
            reader.post("/v1/completions", json={"model": "toy", "prompt": "x"}),
        ):
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "insufficient_permissions"
    with system.http(second["secret"]) as full:
        assert full.post("/admin/tenants", json={"name": "made by the second"}).status_code == 201
        for first in (
            full.delete(f"{OPERATORS_KEYS}/operator"),
            full.post(f"{OPERATORS_KEYS}/operator/rotate"),
        ):
            assert first.status_code == 409
            assert "is in a file of the server" in first.json()["error"]["message"]
        assert full.delete(f"{OPERATORS_KEYS}/{dashboard['id']}").status_code == 200
        assert full.delete(f"{OPERATORS_KEYS}/{second['id']}").status_code == 200
        assert full.get("/admin/tenants").status_code == 401
    assert operator.get("/admin/tenants").status_code == 200


def test_an_operators_key_reads_closed_metrics_and_a_tenants_does_not(valkey_url: str) -> None:
    with started(valkey_url, metrics_token="a token for metrics") as system:
        with system.http(system.operator) as operator:
            reader = made(operator, OPERATORS_KEYS, scopes=["read"])["secret"]
            writer = made(operator, OPERATORS_KEYS, scopes=["adapters"])["secret"]
        secrets = ("a token for metrics", system.operator, reader, writer, system.tenant("one"))
        assert [works(system, secret, "/metrics") for secret in secrets] == [True, True, True, False, False]


def test_a_wrong_trusted_proxy_stops_the_start() -> None:
    assert trusted_networks(None) == []
    assert trusted_networks("10.0.0.0/8") == ["10.0.0.0/8", "::ffff:10.0.0.0/104"]
    for wrong in ("", "*", "proxy.local", "10.0.0.0/8,"):
        with pytest.raises(StartupError, match="--trusted-proxies must be networks"):
            trusted_networks(wrong)
