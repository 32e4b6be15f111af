"""Aliases over HTTP: compare-and-swap, weights, pins, rollback, restore, history."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.engine.fake import FakeEngine
from tests.server.api.adapters.test_adapters import ask, names
from tests.server.api.conftest import System, lora_files, upload

PATH = "/v1/adapters/mine/aliases"


@pytest.fixture
def http(system: System, engine: FakeEngine) -> Iterator[httpx.Client]:
    """A tenant of this test's own, with three versions of `mine`."""
    with system.http(system.tenant("fresh")) as client:
        for seed in (1, 2, 3):
            upload(client, "mine", lora_files(seed))
        yield client


def point(client: httpx.Client, alias: str, to: Any, **headers: str) -> httpx.Response:
    body = {"alias": alias} | ({"version": to} if isinstance(to, int) else {"weights": to})
    return client.post(PATH, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_compare_and_swap(http: httpx.Client) -> None:
    assert point(http, "prod", 1, if_match="*").status_code == 412
    assert point(http, "prod", 1, if_none_match="*").status_code == 200
    refused = point(http, "prod", 2, if_none_match="*")
    assert (refused.status_code, refused.json()["error"]["code"]) == (412, "precondition_failed")
    seen = http.get(f"{PATH}/prod")
    assert (seen.json()["version"], seen.json()["weights"]) == (1, None)
    etag = seen.headers["etag"]
    assert point(http, "prod", 2, if_match=f'"other", {etag}').status_code == 200
    assert point(http, "prod", 3, if_match=etag).status_code == 412, "it has moved since"
    assert point(http, "prod", 3, if_match=f"W/{http.get(f'{PATH}/prod').headers['etag']}").status_code == 412
    whole = http.get("/v1/adapters/mine").headers["etag"]
    moved = point(http, "prod", 3, if_match=whole)
    assert moved.status_code == 200, "the adapter's tag vouches for its aliases"
    assert moved.headers["etag"] == http.get("/v1/adapters/mine").headers["etag"] != whole
    assert http.delete(f"{PATH}/prod", headers={"if-match": whole}).status_code == 412
    assert http.post(f"{PATH}/prod/rollback", headers={"if-match": whole}).status_code == 412
    assert http.delete("/v1/adapters/mine", headers={"if-match": whole}).status_code == 412
    etag = http.get("/v1/adapters/mine").headers["etag"]
    assert http.delete("/v1/adapters/mine", headers={"if-match": etag}).status_code == 200


def test_the_same_state_again_changes_nothing(http: httpx.Client) -> None:
    first = point(http, "prod", 1)
    assert point(http, "prod", 1).headers["etag"] == first.headers["etag"]
    assert len(http.get("/v1/adapters/mine/history").json()["data"]) == 4


def test_of_fifty_who_saw_the_same_one_wins(http: httpx.Client) -> None:
    point(http, "prod", 1)
    etag = http.get(f"{PATH}/prod").headers["etag"]
    statuses: list[int] = []
    threads = [
        threading.Thread(
            target=lambda n=n: statuses.append(point(http, "prod", 2 + n % 2, if_match=etag).status_code)
        )
        for n in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [412] * 49


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"if-match": "abc"}, "quotes"),
        ({"if-match": '"a"b"'}, "quotes"),
        ({"if-match": ""}, "quotes"),
        ({"if-match": ",".join(['"a"'] * 17)}, "more than 16"),
        ({"if-none-match": '"abc"'}, "only be *"),
        ({"if-none-match": "*", "if-match": "*"}, "without an If-Match"),
    ],
)
def test_bad_conditions_are_refused(http: httpx.Client, headers: dict[str, str], said: str) -> None:
    refused = http.post(PATH, json={"alias": "prod", "version": 1}, headers=headers)
    assert (refused.status_code, said in refused.json()["error"]["message"]) == (400, True), refused.text
    assert http.get(f"{PATH}/prod").status_code == 404


def test_deleting_takes_no_if_none_match(http: httpx.Client) -> None:
    point(http, "prod", 1)
    for answer in (
        http.delete(f"{PATH}/prod", headers={"if-none-match": "*"}),
        http.delete("/v1/adapters/mine", headers={"if-none-match": "*"}),
        http.post(f"{PATH}/prod/rollback", headers={"if-none-match": "*"}),
    ):
        assert answer.status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"alias": "x"}, 400, "either version or weights"),
        ({"alias": "x", "version": 1, "weights": {"1": 1}}, 400, "either version or weights"),
        ({"alias": "x", "weights": {}}, 400, "1 to 10"),
        ({"alias": "x", "weights": {"1": "1"}}, 400, "weights"),
        ({"alias": "x", "weights": {"1": 1, "v1": 1}}, 400, "twice"),
        ({"alias": "x", "weights": {"1": 0, "2": 1}}, 400, "over 0"),
        ({"alias": "x", "weights": [1, 2]}, 400, "weights"),
        ({"alias": "x", "version": 0}, 400, "version"),
        ({"alias": "v7", "version": 1}, 400, "'v7'"),
        ({"alias": "../x", "version": 1}, 400, "alias"),
        ({"alias": "latest", "weights": {"1": 1, "2": 1}}, 400, "'latest' takes one version"),
        ({"alias": "x", "version": 9}, 404, "mine@9"),
        ({"alias": "x", "weights": {"1": 1, "9": 1}}, 404, "mine@9"),
    ],
)
def test_bad_aliases_are_refused_in_a_sentence(
    http: httpx.Client, body: dict[str, Any], status: int, said: str
) -> None:
    refused = http.post(PATH, json=body)
    assert (refused.status_code, said in refused.json()["error"]["message"]) == (status, True), refused.text


def test_a_canary_answers_each_user_with_one_version(
    http: httpx.Client, system: System, engine: FakeEngine
) -> None:
    assert point(http, "canary", {"v1": 0.5, "2": 0.5}).json()["aliases"]["canary"] == {"1": 0.5, "2": 0.5}
    answered: dict[str, set[str]] = {}
    for user in [f"u{i}" for i in range(24)] * 2:
        body = {"model": "mine@canary", "prompt": "x", "user": user}
        answer = http.post("/v1/completions", json=body)
        version = answer.headers["x-polypeft-adapter"]
        digest = http.get(f"/v1/adapters/mine/versions/{version[-1]}").json()["digest"]
        assert answer.json()["system_fingerprint"] == f"fp_{digest[:16]}"
        assert answer.json()["model"] == "mine@canary"
        answered.setdefault(user, set()).add(version)
    assert all(len(versions) == 1 for versions in answered.values())
    assert set.union(*answered.values()) == {"mine@1", "mine@2"}
    without = {ask(http, "mine@canary").headers["x-polypeft-adapter"] for _ in range(5)}
    assert len(without) == 1, "by key"


def test_streams_and_stacks_tell_their_versions_too(http: httpx.Client) -> None:
    body = {"model": "mine", "messages": [{"role": "user", "content": "x"}], "stream": True}
    streamed = http.post("/v1/chat/completions", json=body)
    assert streamed.headers["x-polypeft-adapter"] == "mine@3"
    assert streamed.text.endswith("data: [DONE]\n\n")
    stacked = {"model": "toy", "prompt": "x", "adapters": [{"name": "mine@1"}, {"name": "mine@2"}]}
    both = http.post("/v1/completions", json=stacked)
    assert both.headers["x-polypeft-adapter"] == "mine@1, mine@2"
    assert "x-polypeft-adapter" not in ask(http, "toy").headers


def test_a_weighted_alias_names_no_version_to_delete(http: httpx.Client) -> None:
    point(http, "canary", {"1": 0.2, "2": 0.8})
    for path in ("/v1/adapters/mine/versions/canary", "/v1/models/mine@canary"):
        refused = http.delete(path)
        assert (refused.status_code, "several versions" in refused.text) == (400, True)
    assert http.get("/v1/adapters/mine/versions/canary").json()["version"] == 2, "the heaviest stands for it"
    assert http.delete("/v1/adapters/mine/versions/2").status_code == 200
    assert http.get(f"{PATH}/canary").json()["version"] == 1, "who is left gets all"


def test_rollback_goes_back_step_by_step(http: httpx.Client, engine: FakeEngine) -> None:
    for to in (1, {"1": 0.9, "2": 0.1}, 2):
        point(http, "prod", to)
    back = http.post(f"{PATH}/prod/rollback")
    assert (back.json()["version"], back.json()["weights"]) == (None, {"1": 0.9, "2": 0.1})
    assert back.headers["etag"] == http.get(f"{PATH}/prod").headers["etag"]
    assert http.post(f"{PATH}/prod/rollback").json()["version"] == 1
    refused = http.post(f"{PATH}/prod/rollback")
    assert (refused.status_code, "no earlier state" in refused.text) == (409, True)
    assert http.delete(f"{PATH}/prod").json() == {
        "id": "mine@prod",
        "object": "adapter.alias",
        "deleted": True,
    }
    for answer in (http.get(f"{PATH}/prod"), http.delete(f"{PATH}/prod"), http.post(f"{PATH}/prod/rollback")):
        assert answer.status_code == 404
    assert ask(http, "mine@prod").status_code == 404


def test_latest_is_rolled_back_until_something_newer_comes(http: httpx.Client) -> None:
    assert http.post(f"{PATH}/latest/rollback").json()["version"] == 2
    adapter = http.get("/v1/adapters/mine").json()
    assert (adapter["version"], adapter["latest_pinned"]) == (2, True)
    assert ask(http, "mine").headers["x-polypeft-adapter"] == "mine@2"
    upload(http, "mine", lora_files(4))
    assert ask(http, "mine").headers["x-polypeft-adapter"] == "mine@4"
    assert http.delete("/v1/adapters/mine/versions/4").status_code == 200
    assert ask(http, "mine").headers["x-polypeft-adapter"] == "mine@2", "3 was taken back, and still is"
    assert http.delete(f"{PATH}/latest").status_code == 200
    assert ask(http, "mine").headers["x-polypeft-adapter"] == "mine@3"
    assert http.delete(f"{PATH}/latest").status_code == 404
    assert point(http, "latest", 1).json()["version"] == 1


def test_what_is_deleted_comes_back_with_its_aliases(http: httpx.Client, engine: FakeEngine) -> None:
    point(http, "prod", {"1": 1, "3": 3})
    before = http.get("/v1/adapters/mine").json()
    assert http.delete("/v1/adapters/mine").json()["purged"] is False
    for path in ("/v1/adapters/mine", "/v1/adapters/mine/versions/1", f"{PATH}/prod", "/v1/models/mine"):
        assert http.get(path).status_code == 404
    assert names(http) == []
    (gone,) = http.get("/v1/adapters", params={"deleted": "true"}).json()["data"]
    assert (gone["name"], [v["version"] for v in gone["versions"]]) == ("mine", [1, 2, 3])
    kept = [v["purged_after"] - v["deleted_at"] for v in gone["versions"]]
    assert all(abs(seconds - 7 * 86_400) <= 1 for seconds in kept)
    back = http.post("/v1/adapters/mine/restore").json()
    assert back["aliases"] == {"latest": 3, "prod": {"1": 1.0, "3": 3.0}}
    assert http.get("/v1/adapters/mine").json() == before
    assert http.get("/v1/adapters", params={"deleted": "true"}).json()["data"] == []
    assert ask(http, "mine@prod").status_code == 200
    refused = http.post("/v1/adapters/mine/restore")
    assert (refused.status_code, "no deleted adapter 'mine'" in refused.text) == (404, True)


def test_a_name_is_free_while_its_past_can_be_restored(http: httpx.Client) -> None:
    http.delete("/v1/adapters/mine")
    assert upload(http, "mine", lora_files(9)).json()["version"] == 4
    back = http.post("/v1/adapters/mine/restore", params={"version": "v2"}).json()
    assert ([v["version"] for v in back["versions"]], back["version"]) == ([2, 4], 4)
    for version in ("x", "-1", "1.5"):
        assert http.post("/v1/adapters/mine/restore", params={"version": version}).status_code == 400


def test_a_purge_is_for_good_and_takes_the_bytes(http: httpx.Client, system: System) -> None:
    objects = system.app.state.services.objects
    blobs = [key for key in objects.list_sync("tenants") if "/blobs/" in key]
    http.delete("/v1/adapters/mine/versions/1")
    assert http.delete("/v1/adapters/mine/versions/1").status_code == 404
    assert http.delete("/v1/adapters/mine/versions/1?purge=true").json()["purged"] is True
    assert http.delete("/v1/adapters/mine?purge=true").status_code == 200
    assert len([key for key in objects.list_sync("tenants") if "/blobs/" in key]) == len(blobs) - 6
    assert http.post("/v1/adapters/mine/restore").status_code == 404
    assert http.delete("/v1/adapters/mine?purge=true").status_code == 404
    assert http.delete("/v1/adapters/mine?purge=maybe").status_code == 400
    assert http.get("/v1/adapters", params={"deleted": "maybe"}).status_code == 400


def test_a_restore_counts_against_the_quota(http: httpx.Client) -> None:
    http.delete("/v1/adapters/mine")
    for i in range(20):
        upload(http, f"a{i}")
    refused = http.post("/v1/adapters/mine/restore")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    http.delete("/v1/adapters/a0")
    assert http.post("/v1/adapters/mine/restore").status_code == 200


def test_the_history_says_who_did_what(http: httpx.Client, system: System) -> None:
    point(http, "prod", {"1": 0.5, "2": 0.5})
    http.delete("/v1/adapters/mine/versions/2")
    http.delete("/v1/adapters/mine")
    entries = http.get("/v1/adapters/mine/history").json()["data"]
    assert [entry["action"] for entry in entries] == ["delete", "delete", "alias", *["publish"] * 3]
    assert (entries[1]["versions_removed"], entries[1]["before"], entries[1]["after"]) == (
        [2],
        {"prod": {"1": 0.5, "2": 0.5}},
        {"prod": 1},
    )
    assert entries[0]["after"] == {"latest": None, "prod": None}
    assert entries[-1] | {"id": "", "created": 0, "actor": ""} == {
        "object": "adapter.change",
        "id": "",
        "created": 0,
        "actor": "",
        "action": "publish",
        "versions_added": [1],
        "versions_removed": [],
        "before": {"latest": None},
        "after": {"latest": 1},
    }
    (actor,) = {entry["actor"] for entry in entries}
    with system.http(system.operator) as operator:
        tenants = operator.get("/admin/tenants").json()["data"]
        keys = [
            key["id"]
            for t in tenants
            for key in operator.get(f"/admin/tenants/{t['id']}/keys").json()["data"]
        ]
    assert actor in keys
    secret = http.headers["authorization"].removeprefix("Bearer ")
    assert secret not in str(entries)
