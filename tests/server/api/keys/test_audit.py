"""The audit log: each change has one entry, in its tenant's log, without a secret; none goes without."""

import csv
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from redis import Redis as SyncRedis

from server.audit.audit_log import AuditLog, Span
from server.audit.entry import Entry
from server.audit.newest import newest_first
from tests.server.api.conftest import System, lora_files, upload
from tests.server.api.fine_tuning.training import create, send

Found = list[dict[str, Any]]


@pytest.fixture
def http(system: System, tenant: dict[str, Any]) -> Iterator[httpx.Client]:
    with system.http(tenant["key"]) as client:
        yield client


def log(client: httpx.Client, path: str = "/v1/audit", **query: Any) -> Found:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    found: Found = answer.json()["data"]
    return found


def told(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["action"], entry["target"], entry["outcome"]


def test_each_change_of_a_tenant_is_there(system: System, http: httpx.Client, tenant: dict[str, Any]) -> None:
    upload(http, "poet", lora_files())
    upload(http, "poet", lora_files(1))
    http.post("/v1/adapters/poet/aliases", json={"alias": "live", "version": 1})
    http.post("/v1/adapters/poet/aliases", json={"alias": "live", "weights": {"1": 1, "2": 3}})
    http.post("/v1/adapters/poet/aliases/live/rollback")
    http.delete("/v1/adapters/poet/aliases/live")
    http.post("/v1/adapters/poet/pin")
    http.delete("/v1/adapters/poet/pin")
    http.delete("/v1/adapters/poet/versions/2")
    http.post("/v1/adapters/poet/restore")
    file = send(http)
    job = create(http, file, suffix="poet").json()["id"]
    for action in ("pause", "resume", "cancel"):
        http.post(f"/v1/fine_tuning/jobs/{job}/{action}")
    http.delete(f"/v1/files/{file}")
    key = http.post("/v1/keys", json={"name": "CI", "scopes": ["read"]}).json()
    http.post(f"/v1/keys/{key['id']}/rotate", json={"overlap_seconds": 5})
    http.delete(f"/v1/keys/{key['id']}")
    http.delete("/v1/models/poet")
    assert [told(entry) for entry in reversed(log(http))] == [
        ("tenant.create", tenant["id"], "done"),
        ("adapter.upload", "poet@1", "done"),
        ("adapter.upload", "poet@2", "done"),
        ("alias.set", "poet/live", "done"),
        ("alias.set", "poet/live", "done"),
        ("alias.rollback", "poet/live", "done"),
        ("alias.delete", "poet/live", "done"),
        ("pin.set", "poet", "done"),
        ("pin.delete", "poet", "done"),
        ("adapter.delete", "poet/2", "done"),
        ("adapter.restore", "poet", "done"),
        ("file.upload", file, "done"),
        ("job.create", job, "done"),
        *((f"job.{action}", job, "done") for action in ("pause", "resume", "cancel")),
        ("file.delete", file, "done"),
        ("key.create", key["id"], "done"),
        ("key.rotate", key["id"], "done"),
        ("key.revoke", key["id"], "done"),
        ("adapter.delete", "poet", "done"),
    ]
    [own_key] = http.get("/v1/keys").json()["data"]
    entries = log(http, limit=20)
    assert {entry["actor"] for entry in entries} == {own_key["id"]}
    assert {entry["by"] for entry in entries} == {entry["tenant"] for entry in entries} == {tenant["id"]}
    assert {entry["address"] for entry in entries} == {"127.0.0.1"}
    assert len({entry["request_id"] for entry in entries}) == 20
    assert all(entry["request_id"].startswith("req_") for entry in entries)
    made = next(entry for entry in entries if entry["action"] == "key.create")
    assert made["details"] == {"name": "CI", "scopes": ["read"], "expires_at": None, "addresses": []}
    assert made["status"] == 201
    assert abs(made["time"] - time.time()) < 600
    weights = next(entry for entry in entries if entry["action"] == "alias.set")
    assert weights["details"] == {"target": {"1": 1.0, "2": 3.0}}


def test_a_request_that_came_before_names_the_same_job(http: httpx.Client) -> None:
    file = send(http)
    made = [create(http, file, headers={"Idempotency-Key": "once"}).json()["id"] for _ in range(2)]
    assert [entry["target"] for entry in log(http, action="job.create")] == made
    assert len(set(made)) == 1


def test_what_is_refused_is_there_with_the_reason(system: System, http: httpx.Client) -> None:
    reader = http.post("/v1/keys", json={"scopes": ["read"]}).json()
    with system.http(reader["secret"]) as limited:
        answer = limited.delete("/v1/adapters/poet")
        limited.post("/admin/tenants", json={"name": "evil"})
    http.delete("/v1/adapters/\u202e=cmd|'x'!A1")
    http.post("/v1/keys", json={"scopes": ["all"]})
    denied, operators, missing, invalid = reversed(log(http, outcome="refused"))
    assert (denied["actor"], denied["status"], told(denied)) == (
        *(reader["id"], 403),
        ("adapter.delete", "poet", "refused"),
    )
    assert denied["request_id"] == answer.headers["x-request-id"]
    assert (operators["action"], operators["status"]) == ("tenant.create", 403)
    assert (missing["status"], missing["target"]) == (404, "?=cmd|'x'!A1")
    assert (invalid["action"], invalid["status"]) == ("key.create", 400)


def test_reading_and_generating_leave_nothing(http: httpx.Client) -> None:
    before = log(http)
    for path in ("models", "adapters", "files", "keys", "limits", "fine_tuning/jobs", "audit"):
        assert http.get(f"/v1/{path}").status_code == 200
    assert http.post("/v1/completions", json={"model": "toy", "prompt": "x"}).status_code == 200
    assert log(http) == before


def test_the_operators_changes_are_in_the_log_of_their_tenant(
    system: System, operator: httpx.Client, http: httpx.Client, tenant: dict[str, Any]
) -> None:
    named = operator.post("/admin/tenants/operator/keys", json={"name": "on call"}).json()
    path = f"/admin/tenants/{tenant['id']}"
    with system.http(named["secret"]) as full:
        full.put(f"{path}/limits", json={"requests_per_minute": 7})
        key = full.post(f"{path}/keys", json={"name": "second"}).json()
        full.post(f"{path}/adapters", data={"name": "given"}, files=lora_files())
        full.delete(f"{path}/keys/key_x")
        full.put("/admin/tenants/ten_x/limits", json={})
        full.post("/admin/gc", json={"dry_run": True})
    seen = [told(entry) for entry in log(http)]
    assert seen[:3] == [
        ("adapter.upload", "given@1", "done"),
        ("key.create", key["id"], "done"),
        ("limits.set", "", "done"),
    ]
    assert [told(entry) for entry in log(operator, "/admin/audit", tenant=tenant["id"])] == seen
    for entry in log(http):
        assert (entry["actor"], entry["by"], entry["address"], entry["request_id"]) == (
            *("operator", "operator"),
            *("", ""),
        )
    mine = log(operator, "/admin/audit", actor=named["id"])
    assert {entry["address"] for entry in mine} == {"127.0.0.1"}
    assert [(*told(entry), entry["tenant"]) for entry in mine][:3] == [
        ("store.gc", "", "done", "operator"),
        ("limits.set", "", "refused", "operator"),
        ("key.revoke", "key_x", "refused", "operator"),
    ]
    assert mine[1]["details"] == {"tenant": "ten_x"}
    limits = next(entry for entry in mine if entry["outcome"] == "done" and entry["action"] == "limits.set")
    assert limits["details"] == {"tenant": tenant["id"], "requests_per_minute": 7}


def test_a_tenant_sees_its_own_log_only(
    system: System, operator: httpx.Client, http: httpx.Client, tenant: dict[str, Any]
) -> None:
    with system.http(system.tenant("another")) as another:
        another.post("/v1/keys", json={"name": "another's"})
        theirs = log(another)
        assert log(http, after=theirs[0]["id"]) == log(http), "another's id is only a time"
        assert {entry["tenant"] for entry in theirs}.isdisjoint({entry["tenant"] for entry in log(http)})
        assert http.get("/v1/audit", params={"tenant": theirs[0]["tenant"]}).status_code == 400
        assert http.get("/admin/audit").status_code == 403
    assert operator.get("/admin/audit", params={"tenant": "ten_x"}).status_code == 404


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_pages_of_all_tenants_join_without_gap(
    system: System, operator: httpx.Client, limit: int, valkey_url: str
) -> None:
    keys = [system.tenant(f"of {i}") for i in range(5)]
    for _ in range(4):
        for key in keys:
            with system.http(key) as client:
                client.delete("/v1/adapters/none")
    whole = log(operator, "/admin/audit", action="adapter.", limit=1000)
    assert len(whole) >= 20
    times = [entry["time"] for entry in whole]
    assert times == sorted(times, reverse=True)
    joined: Found = []
    after: dict[str, Any] = {}
    while page := operator.get("/admin/audit", params={"action": "adapter.", "limit": limit, **after}).json():
        joined += page["data"]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert joined == whole
    recent = log(operator, "/admin/audit", since=times[9], until=times[3], limit=1000)
    assert [entry for entry in recent if entry["action"] == "adapter.delete"] == [
        entry for entry in whole if times[9] <= entry["time"] <= times[3]
    ]


def test_exports_have_all_and_no_formula(system: System, http: httpx.Client) -> None:
    for number in range(5):
        http.delete(f"/v1/adapters/=1+{number}")
    http.post("/v1/keys", json={"name": '=HYPERLINK("x")'})
    entries = log(http)
    lines = http.get("/v1/audit", params={"format": "jsonl", "limit": 1})
    assert lines.headers["content-type"].startswith("application/jsonl")
    assert [json.loads(line) for line in lines.text.splitlines()] == entries
    table = http.get("/v1/audit", params={"format": "csv", "action": "adapter.delete"})
    assert table.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [row["target"] for row in rows] == [f"'=1+{number}" for number in reversed(range(5))]
    assert [row["id"] for row in rows] == [entry["id"] for entry in entries[1:6]]


@pytest.mark.parametrize(
    "query",
    [
        *(
            {"limit": 0},
            {"limit": 1001},
            {"limit": "x"},
            {"after": "x"},
            {"after": "1-2"},
            {"after": "-1-2-ten"},
        ),
        *({"after": "9" * 40 + "-0-ten"}, {"format": "xml"}, {"outcome": "good"}, {"since": "nan"}),
        *({"since": "yesterday"}, {"until": "inf"}, {"unknown": 1}, {"since": 1e300}, {"until": -5}),
    ],
    ids=str,
)
def test_a_wrong_query_is_a_sentence(http: httpx.Client, query: dict[str, Any]) -> None:
    for format_ in ("json", "csv"):
        answer = http.get("/v1/audit", params={"format": format_} | query)
        assert answer.status_code == 400, answer.text
        assert next(iter(query)) in answer.json()["error"]["message"]


def test_no_secret_is_in_the_log(
    system: System, operator: httpx.Client, http: httpx.Client, valkey_url: str
) -> None:
    key = http.post("/v1/keys").json()
    new = http.post(f"/v1/keys/{key['id']}/rotate").json()
    http.delete(f"/v1/keys/{new['secret']}")
    http.post("/v1/completions", json={"model": "toy", "prompt": "a private prompt"})
    with SyncRedis.from_url(valkey_url) as redis:
        streams = [redis.xrange(name) for name in redis.keys("pp:audit:*") if name != b"pp:audit:begun"]
        assert redis.hlen("pp:audit:begun") == 0
    kept = str(streams)
    assert key["secret"] not in kept
    assert "a private prompt" not in kept
    assert new["secret"] not in kept, "one that a caller puts into a path, too"


def test_a_change_that_cannot_be_written_down_is_refused(http: httpx.Client, valkey_url: str) -> None:
    before = log(http)
    with SyncRedis.from_url(valkey_url) as redis:
        redis.config_set("min-replicas-to-write", 1)
        try:
            answer = upload(http, "unwritten", lora_files())
        finally:
            redis.config_set("min-replicas-to-write", 0)
    assert answer.status_code == 507
    assert http.get("/v1/adapters/unwritten").status_code == 404
    assert log(http) == before


def test_a_change_whose_process_ended_has_an_entry_too(
    system: System, http: httpx.Client, tenant: dict[str, Any], valkey_url: str
) -> None:
    audit = system.app.state.services.audit
    lost = Entry(actor="key_1", by=tenant["id"], action="key.create", request_id="req_lost")
    system.call(audit.begin("req_lost", tenant["id"], lost))
    assert system.call(audit.settle_lost()) == 0, "it may still go on"
    assert system.call(audit.settle_lost(older_than=-1)) == 1
    assert system.call(audit.settle_lost(older_than=-1)) == 0
    assert told(log(http)[0]) == ("key.create", "", "unknown")
    system.call(audit.end("req_lost", tenant["id"], lost))  # it went on after all: once is enough
    assert len([entry for entry in log(http) if entry["request_id"] == "req_lost"]) == 1


def test_a_log_is_bounded_by_number_and_age(system: System, http: httpx.Client, valkey_url: str) -> None:
    audit = AuditLog(system.app.state.services.redis, days=1, max_entries=100)

    async def fill() -> list[Any]:
        for number in range(500):
            entry = Entry(actor="a", by="ten_full", action="key.create", target=str(number))
            async with audit.change(f"token {number}", "ten_full", entry):
                pass
        return [recorded async for recorded in newest_first(audit, ["ten_full"], Span())]

    kept = system.call(fill())
    assert 100 <= len(kept) <= 200  # whole nodes are dropped
    assert [int(recorded.entry.target) for recorded in kept] == list(range(499, 499 - len(kept), -1))
    with SyncRedis.from_url(valkey_url) as redis:
        assert 0 < redis.pttl("pp:audit:ten_full") <= 86_400_000
        old = int((time.time() - 2 * 86_400) * 1000)
        redis.xadd("pp:audit:ten_old", {"entry": b'{"actor":"a","by":"b","action":"c"}'}, id=f"{old}-0")

    async def read(tenant: str) -> list[Any]:
        return [recorded async for recorded in newest_first(audit, [tenant], Span())]

    assert system.call(read("ten_old")) == []
