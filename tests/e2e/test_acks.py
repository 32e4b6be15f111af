"""What was acknowledged is there, and nothing is there by half, however often processes are killed meanwhile.

Each client keeps a ledger of what the server told it, and at the end compares. A failed run prints its seed.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.serving import Serving, ask, files_of, until

SEED = random.SystemRandom().randrange(2**32)
KILLS = ["engine", "api", "valkey"] * 3
CLIENTS = 3
ADAPTERS = 6
PROMPT = "What is the capital of France?"
TRY_AGAIN = {500, 502, 503, 504}
Lora = Callable[[int], Path]


@dataclass
class Adapter:
    """What a client knows of one name."""

    versions: dict[int, int] = field(default_factory=dict)  # acknowledged and not deleted: version -> seed
    aliases: dict[str, int] = field(default_factory=dict)
    unsure: list[int] = field(default_factory=list)  # seeds of uploads whose answer never came
    used: set[int] = field(default_factory=set)  # every version number there ever was


class Client:
    """Uploads, points aliases, deletes, makes and revokes keys, at random."""

    def __init__(self, server: Serving, number: int, loras: list[Path]) -> None:
        self.chance = random.Random(SEED + number)
        self.server, self.loras = server, loras
        with server.http(server.operator) as operator:
            made = operator.post("/admin/tenants", json={"name": f"client-{number}"}).json()
        self.tenant, self.key = made["id"], made["key"]
        self.adapters = {name: Adapter() for name in "abc"}
        self.keys: dict[str, str] = {}
        self.revoked: list[str] = []
        self.done: list[str] = []

    def work(self, over: threading.Event) -> None:
        actions = [self.upload] * 4 + [self.alias] * 2 + [self.delete, self.make_key, self.revoke_key]
        while not over.is_set():
            self.chance.choice(actions)()

    def upload(self) -> None:
        name, seed = self.chance.choice("abc"), self.chance.randrange(ADAPTERS)
        adapter = self.adapters[name]
        answer = self.send("POST", "/v1/adapters", data={"name": name}, files=files_of(self.loras[seed]))
        if answer is None or answer.status_code in TRY_AGAIN:
            adapter.unsure.append(seed)
            return
        assert answer.status_code == 201, answer.text
        version = answer.json()["version"]
        assert version not in adapter.used, "a number was used twice"
        adapter.used.add(version)
        adapter.versions[version] = seed
        self.done.append("upload")

    def alias(self) -> None:
        name = self.chance.choice("abc")
        adapter = self.adapters[name]
        if adapter.versions:
            alias, version = self.chance.choice(["x", "y"]), self.chance.choice([*adapter.versions])
            self.insist(
                {200}, "POST", f"/v1/adapters/{name}/aliases", json={"alias": alias, "version": version}
            )
            adapter.aliases[alias] = version
            self.done.append("alias")

    def delete(self) -> None:
        """404: it was never there, or an earlier try worked before its answer was lost."""
        name = self.chance.choice("abc")
        self.insist({200, 404}, "DELETE", f"/v1/adapters/{name}")
        self.adapters[name] = Adapter(used=self.adapters[name].used | {*self.adapters[name].versions})
        self.done.append("delete")

    def make_key(self) -> None:
        answer = self.send("POST", f"/admin/tenants/{self.tenant}/keys", operator=True)
        if answer is not None and answer.status_code == 201:
            self.keys[answer.json()["id"]] = answer.json()["secret"]
            self.done.append("key")

    def revoke_key(self) -> None:
        if self.keys:
            id_ = self.chance.choice([*self.keys])
            self.insist({200, 404}, "DELETE", f"/admin/tenants/{self.tenant}/keys/{id_}", operator=True)
            self.revoked.append(self.keys.pop(id_))
            self.done.append("revoke")

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


def test_nothing_acknowledged_is_lost_and_nothing_is_there_by_half(
    mortal: Serving, lora: Lora, golden: Callable[..., str]
) -> None:
    chance = random.Random(SEED)
    kills = chance.sample(KILLS, len(KILLS))
    loras = [lora(seed) for seed in range(ADAPTERS)]
    over = threading.Event()
    clients = [Client(mortal, number, loras) for number in range(CLIENTS)]
    with ThreadPoolExecutor() as pool:
        working = [pool.submit(client.work, over) for client in clients]
        try:
            for name in kills:
                time.sleep(chance.uniform(0.3, 1.5))
                mortal.kill(name)
                time.sleep(0.05)
                until(mortal.ready, mortal.log, seconds=60)
        finally:
            over.set()
    for client, work in zip(clients, working, strict=True):
        assert work.exception() is None, (f"seed {SEED}", client.done, work.exception())
    assert {"upload", "alias", "delete", "key", "revoke"} <= {what for c in clients for what in c.done}
    until(mortal.ready, mortal.log, seconds=60)
    texts = [golden(folder, PROMPT) for folder in loras]
    for client in clients:
        compare(client, loras, texts)
    until(lambda: not [*(mortal.data_dir / "incoming").iterdir()])  # what dead uploads left behind


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
