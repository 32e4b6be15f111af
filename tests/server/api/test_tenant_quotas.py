"""What a tenant may keep and train: its own limit, or else the server's default, live, by one mechanism."""

from collections.abc import Iterator
from typing import NamedTuple

import httpx
import pytest

from tests.server.api.conftest import System, lora_files, upload
from tests.server.api.fine_tuning.training import Worker, create, send


class Quotas(NamedTuple):
    client: httpx.Client
    operator: httpx.Client
    route: str

    def set(self, **limits: int) -> None:
        assert self.operator.put(self.route, json=limits).status_code == 200


@pytest.fixture
def quotas(system: System) -> Iterator[Quotas]:
    with system.http(system.operator) as operator:
        made = operator.post("/admin/tenants", json={"name": "keeps"}).json()
        with system.http(made["key"]) as client:
            yield Quotas(client, operator, f"/admin/tenants/{made['id']}/limits")


def file(client: httpx.Client, content: bytes) -> httpx.Response:
    return client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("d.jsonl", content)})


def said(answer: httpx.Response) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded"), answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_adapters(quotas: Quotas) -> None:
    client = quotas.client
    assert [upload(client, name).status_code for name in "ab"] == [201, 201]
    quotas.set(adapters=1)
    assert said(upload(client, "c")) == "A tenant may have 1 adapters; delete one first."
    assert upload(client, "b", lora_files(1)).status_code == 201  # what is there stays, and gets versions
    assert client.get("/v1/limits").json()["max_adapters_per_tenant"] == 1
    quotas.set(adapters=3)
    assert upload(client, "c").status_code == 201
    quotas.set(adapters=0)
    assert "may have 0 adapters" in said(upload(client, "d"))
    quotas.set()
    assert upload(client, "d").status_code == 201
    assert client.get("/v1/limits").json()["max_adapters_per_tenant"] == 20


def test_adapter_bytes(quotas: Quotas) -> None:
    quotas.set(adapter_bytes=1000)
    assert said(upload(quotas.client, "a")).startswith("A tenant may keep 1000 bytes of adapters")
    quotas.set(adapter_bytes=1 << 50)
    assert upload(quotas.client, "a").status_code == 201
    assert quotas.client.get("/v1/limits").json()["max_adapter_bytes_per_tenant"] == 1 << 50


def test_file_bytes(quotas: Quotas) -> None:
    quotas.set(file_bytes=100)
    assert file(quotas.client, b"x" * 60).status_code == 200
    assert said(file(quotas.client, b"x" * 60)) == "A tenant may have 100 bytes in files; delete some first."
    upload_ = {"filename": "a", "bytes": 60, "purpose": "fine-tune", "mime_type": "text/plain"}
    assert "100 bytes in files" in said(quotas.client.post("/v1/uploads", json=upload_))
    quotas.set(file_bytes=120)
    assert file(quotas.client, b"x" * 60).status_code == 200
    assert quotas.client.get("/v1/limits").json()["max_files_bytes_per_tenant"] == 120


def test_jobs_and_training_tokens(quotas: Quotas, system: System) -> None:
    client = quotas.client
    data, epochs = send(client), {"hyperparameters": {"n_epochs": 2}}
    quotas.set(jobs=1)
    first = create(client, data, **epochs).json()["id"]
    assert said(create(client, data)) == "A tenant may have 1 unfinished fine-tuning jobs."
    events = client.get(f"/v1/fine_tuning/jobs/{first}/events").json()["data"]
    tokens = 2 * next(event["data"]["tokens"] for event in events if event["data"])
    quotas.set(jobs=2, training_tokens_per_day=2 * tokens - 1)
    refused = create(client, data, **epochs)
    assert f"take {tokens}, and this one would take {tokens}." in said(refused)
    assert refused.json()["error"]["param"] == "training_file"
    assert client.post(f"/v1/fine_tuning/jobs/{first}/cancel").status_code == 200  # its tokens go back
    second = create(client, data, **epochs).json()["id"]
    worker = Worker(system, second)
    worker.beat(step=1, total_steps=8, trained_tokens=70)
    assert client.post(f"/v1/fine_tuning/jobs/{second}/cancel").status_code == 200
    quotas.set(training_tokens_per_day=tokens + 69)
    assert f"take 70, and this one would take {tokens}." in said(create(client, data, **epochs))
    quotas.set(training_tokens_per_day=tokens + 70)
    assert create(client, data, **epochs).status_code == 200
    seen = client.get("/v1/limits").json()
    assert (seen["training_tokens_per_day"], seen["max_jobs_per_tenant"]) == (tokens + 70, 8)
