"""What was acknowledged is there, and nothing is there by half, however often processes are killed meanwhile.

Each client keeps a ledger of what the server told it, compares while it works, and compares all at the end.

ACKS_KILLS is how many kills of each process, ACKS_SEED when and of what; a failed run prints its seed.
"""

import hashlib
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import Serving, ask, body, files_of
from tests.fixtures.s3 import Weed
from tests.waiting import until

SEED = int(os.environ.get("ACKS_SEED", random.SystemRandom().randrange(2**32)))
KILLS = int(os.environ.get("ACKS_KILLS", "0"))  # 0: few
AT_ONCE = (1, 1, 2, 4, 8)  # kills before all must be well again
CLIENTS = 3
ADAPTERS = 6
PROMPT = "What is the capital of France?"
TRY_AGAIN = {500, 502, 503, 504}
Lora = Callable[[int], Path]
log = logging.getLogger(__name__)


class System:
    """A server on a store in a folder, or on S3, whose process is a fourth that may be killed."""

    def __init__(self, tiny: Path, folder: Path, weed: Weed | None) -> None:
        options = ["--workers", "0", "--adapter-slots", "4", "--adapter-ram-bytes", str(1 << 20)]
        options += ["--max-uploads-per-tenant", "10000"]
        if weed is not None:
            options += ["--store", weed.url(), "--store-config", str(weed.config)]
        self.weed = weed
        self.kills = KILLS or (1 if weed is None else 2)  # of each process
        self.server = Serving(str(tiny), folder, *OPTIONS, *options)

    @property
    def processes(self) -> list[str]:
        return ["engine", "api", "valkey"] + (["store"] if self.weed else [])

    def kill(self, name: str, down_seconds: float) -> None:
        """`down_seconds` is how long the store stays away; the others are their supervisor's to start."""
        if name == "store":
            assert self.weed is not None
            self.weed.kill()
            time.sleep(down_seconds)
            self.weed.start()
        else:
            self.server.kill(name)


@pytest.fixture(params=["folder", "s3"])
def system(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Iterator[System]:
    weed = Weed() if request.param == "s3" else None
    it = System(tiny, tmp_path, weed)
    try:
        if weed is not None:
            weed.start()
        it.server.start()
        yield it
        it.server.stop()
    finally:
        it.server.end()
        if weed is not None:
            weed.end()


@dataclass
class Adapter:
    """What a client knows of one name."""

    versions: dict[int, int] = field(default_factory=dict)  # acknowledged and not deleted: version -> seed
    aliases: dict[str, int] = field(default_factory=dict)
    unsure: list[int] = field(default_factory=list)  # seeds of uploads whose answer never came
    used: set[int] = field(default_factory=set)  # every version number there ever was


class Client:
    """Uploads, points aliases, deletes, makes and revokes keys, at random."""

    def __init__(self, system: System, number: int, loras: list[Path], texts: list[str]) -> None:
        self.chance = random.Random(SEED + number)
        self.server, self.loras, self.texts = (server := system.server), loras, texts
        self.direct = system.weed is not None
        with server.http(server.operator) as operator:
            made = operator.post("/admin/tenants", json={"name": f"client-{number}"}).json()
        self.tenant, self.key = made["id"], made["key"]
        self.adapters = {name: Adapter() for name in "abc"}
        self.keys: dict[str, str] = {}
        self.revoked: list[str] = []
        self.done: Counter[str] = Counter()

    def work(self, over: threading.Event) -> None:
        actions = [self.upload] * 4 + [self.alias] * 2 + [self.delete, self.make_key, self.revoke_key]
        actions += [self.read] * 3 + [self.upload_directly] * 2 * self.direct
        while not over.is_set():
            self.chance.choice(actions)()

    def upload(self) -> None:
        name, seed = self.chance.choice("abc"), self.chance.randrange(ADAPTERS)
        sent = self.send("POST", "/v1/adapters", data={"name": name}, files=files_of(self.loras[seed]))
        self.note_upload(name, seed, sent, "upload")

    def upload_directly(self) -> None:
        """Past the server. What was not completed is nothing."""
        name, seed = self.chance.choice("abc"), self.chance.randrange(ADAPTERS)
        contents = {path.name: path.read_bytes() for path in self.loras[seed].iterdir()}
        files = [{"name": name, "bytes": len(data)} for name, data in contents.items()]
        began = self.send("POST", "/v1/adapter_uploads", json={"name": name, "files": files})
        if began is None or began.status_code in TRY_AGAIN:
            return
        assert began.status_code == 201, began.text
        digests = {}
        for file in began.json()["files"]:
            data = contents[file["name"]]
            digests[file["name"]] = hashlib.sha256(data).hexdigest()
            try:
                if httpx.put(file["url"], content=data).status_code != 200:
                    return
            except httpx.TransportError:
                return
        path = f"/v1/adapter_uploads/{began.json()['id']}/complete"
        self.note_upload(name, seed, self.send("POST", path, json={"sha256": digests}), "direct")

    def note_upload(self, name: str, seed: int, answer: httpx.Response | None, what: str) -> None:
        adapter = self.adapters[name]
        if answer is None or answer.status_code in TRY_AGAIN | {409}:
            adapter.unsure.append(seed)
            self.done["unsure"] += 1
            return
        assert answer.status_code == 201, answer.text
        version = answer.json()["version"]
        assert version not in adapter.used, "a number was used twice"
        adapter.used.add(version)
        adapter.versions[version] = seed
        self.done[what] += 1

    def read(self) -> None:
        """A version or an alias that was acknowledged answers with its own weights, or not now."""
        name = self.chance.choice("abc")
        adapter = self.adapters[name]
        if not adapter.versions:
            return
        known: list[tuple[str | int, int]] = [*adapter.versions.items()]
        known += [(alias, adapter.versions[version]) for alias, version in adapter.aliases.items()]
        selector, seed = self.chance.choice(known)
        answer = self.send("POST", "/v1/completions", json=body(f"{name}@{selector}", PROMPT))
        if answer is None or answer.status_code in TRY_AGAIN:
            return
        assert answer.status_code == 200, f"{name}@{selector} is lost: {answer.text}"
        assert answer.json()["choices"][0]["text"] == self.texts[seed], f"{name}@{selector} is stale"
        self.done["read"] += 1

    def alias(self) -> None:
        name = self.chance.choice("abc")
        adapter = self.adapters[name]
        if adapter.versions:
            alias, version = self.chance.choice(["x", "y"]), self.chance.choice([*adapter.versions])
            self.insist(
                {200}, "POST", f"/v1/adapters/{name}/aliases", json={"alias": alias, "version": version}
            )
            adapter.aliases[alias] = version
            self.done["alias"] += 1

    def delete(self) -> None:
        """404: it was never there, or an earlier try worked before its answer was lost."""
        name = self.chance.choice("abc")
        self.insist({200, 404}, "DELETE", f"/v1/adapters/{name}")
        before = self.adapters[name]  # an upload that nobody heard of may still arrive after this
        self.adapters[name] = Adapter(used=before.used | {*before.versions}, unsure=before.unsure)
        self.done["delete"] += 1

    def make_key(self) -> None:
        answer = self.send("POST", f"/admin/tenants/{self.tenant}/keys", operator=True)
        if answer is not None and answer.status_code == 201:
            self.keys[answer.json()["id"]] = answer.json()["secret"]
            self.done["key"] += 1

    def revoke_key(self) -> None:
        if self.keys:
            id_ = self.chance.choice([*self.keys])
            self.insist({200, 404}, "DELETE", f"/admin/tenants/{self.tenant}/keys/{id_}", operator=True)
            self.revoked.append(self.keys.pop(id_))
            self.done["revoke"] += 1

    def insist(self, statuses: set[int], method: str, path: str, **given: Any) -> None:
        """Again and again until the server says one of these."""
        for _ in range(1000):
            answer = self.send(method, path, **given)
            if answer is not None and answer.status_code in statuses:
                return
            assert answer is None or answer.status_code in TRY_AGAIN, answer.text
        raise TimeoutError(f"{method} {path} never succeeded")

    def send(self, method: str, path: str, operator: bool = False, **given: Any) -> httpx.Response | None:
        """None when the connection broke."""
        try:
            with self.server.http(self.server.operator if operator else self.key) as client:
                answer = client.request(method, path, **given)
        except httpx.TransportError:
            answer = None
        if answer is None or answer.status_code in TRY_AGAIN:
            time.sleep(0.1)
        return answer


def all_done(clients: list[Client]) -> Counter[str]:
    return sum((client.done.copy() for client in clients), Counter[str]())


def test_nothing_acknowledged_is_lost_and_nothing_is_there_by_half(
    system: System, lora: Lora, golden: Callable[..., str]
) -> None:
    chance = random.Random(SEED)
    kills = system.processes * system.kills
    chance.shuffle(kills)
    loras = [lora(seed) for seed in range(ADAPTERS)]
    texts = [golden(folder, PROMPT) for folder in loras]
    over = threading.Event()
    clients = [Client(system, number, loras, texts) for number in range(CLIENTS)]
    expected = {"upload", "alias", "delete", "key", "revoke", "read"} | ({"direct"} if system.weed else set())
    with ThreadPoolExecutor() as pool:
        working = [pool.submit(client.work, over) for client in clients]
        try:
            while kills or not expected <= all_done(clients).keys():
                time.sleep(chance.uniform(0.2, 1.2))
                for _ in range(chance.choice(AT_ONCE)):
                    if kills:
                        system.kill(kills.pop(), down_seconds=chance.uniform(0, 1))
                        time.sleep(chance.uniform(0, 0.5))
                until(system.server.ready, system.server.log)
                if any(work.done() for work in working):
                    break  # with an error, which is told below
        finally:
            over.set()
    for client, work in zip(clients, working, strict=True):
        assert work.exception() is None, (f"seed {SEED}", client.done, work.exception())
    done = all_done(clients)
    log.warning("seed %d, %d kills of each of %s: %s", SEED, system.kills, system.processes, dict(done))
    until(system.server.ready, system.server.log)
    for client in clients:
        compare(client, loras, texts)
    incoming = system.server.data_dir / "incoming"
    until(lambda: not [*incoming.iterdir()])  # what dead uploads left behind


def compare(client: Client, loras: list[Path], texts: list[str]) -> None:
    """The server's word against the ledger's."""
    for secrets, status in (([client.key, *client.keys.values()], 200), (client.revoked, 401)):
        for secret in secrets:
            assert client.server.get("/v1/models", secret).status_code == status, f"seed {SEED}"
    with client.server.http(client.key) as http:
        for name, adapter in client.adapters.items():
            answer = http.get(f"/v1/adapters/{name}")
            found = {v["version"]: v for v in answer.json().get("versions", [])}
            assert answer.status_code == (200 if found else 404)
            assert adapter.versions.keys() <= found.keys(), f"seed {SEED}: {name} lost a version"
            extra = found.keys() - adapter.versions.keys()
            assert len(extra) <= len(adapter.unsure), f"seed {SEED}: {name} has versions nobody sent"
            assert not extra & adapter.used
            if found:
                aliases = answer.json()["aliases"]
                assert aliases == adapter.aliases | {"latest": max(found)}, f"seed {SEED}"
            for version, said in found.items():
                seeds = [adapter.versions[version]] if version in adapter.versions else adapter.unsure
                assert ask(http, f"{name}@{version}", PROMPT) in {texts[seed] for seed in seeds}
                weights = http.get(f"/v1/adapters/{name}/versions/{version}/download").content
                assert hashlib.sha256(weights).hexdigest() == said["sha256"]
                assert weights in {(loras[seed] / "adapter_model.safetensors").read_bytes() for seed in seeds}
            for gone in adapter.used - found.keys():
                asked = {"model": f"{name}@{gone}", "prompt": PROMPT}
                assert http.post("/v1/completions", json=asked).status_code == 404
