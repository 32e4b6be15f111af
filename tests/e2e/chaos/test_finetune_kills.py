"""Fine-tuning while its processes are killed: each job ends as if nothing had been, with exactly one version.

CHAOS_KILLS is how many kills of worker or training process, and half as many of Valkey; CHAOS_SEED when.
Many kills come with longer trainings, so that most hit one.
"""

import json
import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from tests.e2e.serving import Serving, alive, polypeft
from tests.fixtures.workers import IMPATIENT_WORKER
from tests.waiting import until

KILLS = int(os.environ.get("CHAOS_KILLS", "2"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
EPOCHS = 8 if KILLS < 10 else 24
JOB_SECONDS = 240.0
STARTING, START_SECONDS = 0.2, 8.0  # of a training: the share before the first step, and about its time
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima", "Japan": "Tokyo"}
log = logging.getLogger(__name__)


class Impatient(Serving):
    """Its workers' leases lapse after three seconds."""

    program = polypeft(IMPATIENT_WORKER)


class Ended(NamedTuple):
    digest: str  # of the version: what every byte of it hangs on
    losses: list[float]  # of every evaluation


class Trainings:
    """One tenant's jobs, all alike."""

    def __init__(self, server: Serving) -> None:
        self.server = server
        self.http = server.http(server.tenant("chaos"))
        self.file = self._upload()

    def _upload(self) -> str:
        pairs = list(CAPITALS.items()) * 10
        lines = [
            {"prompt": f"{number}. The capital of {land}?", "completion": f" {city}"}
            for number, (land, city) in enumerate(pairs)
        ]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        answer = self.http.post("/v1/files", files={"file": ("c.jsonl", data)}, data={"purpose": "fine-tune"})
        assert answer.status_code == 200, answer.text
        id_: str = answer.json()["id"]
        return id_

    def start(self, name: str) -> str:
        body = {
            "model": "llama",
            "training_file": self.file,
            "suffix": name,
            "seed": 7,
            "hyperparameters": {"n_epochs": EPOCHS, "batch_size": 2},
            "peft": {"type": "lora", "r": 4, "lora_dropout": 0.1, "publish": "always"},
        }
        answer = self.http.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, answer.text
        id_: str = answer.json()["id"]
        return id_

    def job(self, id_: str) -> dict[str, Any]:
        """Asked until it answers: Valkey may be gone."""
        found: list[dict[str, Any]] = []

        def ask() -> bool:
            answer = self.http.get(f"/v1/fine_tuning/jobs/{id_}")
            if answer.status_code == httpx.codes.OK:
                found.append(answer.json())
            return bool(found)

        until(ask, self.server.log)
        return found[0]

    def until(self, id_: str, *statuses: str) -> dict[str, Any]:
        def reached() -> bool:
            time.sleep(0.1)
            return self.job(id_)["status"] in statuses

        until(reached, self.server.log, JOB_SECONDS)
        return self.job(id_)

    def await_moment(self, id_: str, when: float) -> dict[str, Any]:
        """0: it begins, STARTING: its first step, 1: its last. The progress then, up to a second old."""
        if when < STARTING:
            self.until(id_, "running", "succeeded")
            time.sleep(when / STARTING * START_SECONDS)
        else:
            share = (when - STARTING) / (1 - STARTING)

            def come() -> bool:
                time.sleep(0.05)
                now = self.job(id_)["progress"]
                begun = now["phase"] in ("queued", "training")
                return not begun or (now["step"] > 0 and now["step"] >= now["total_steps"] * share)

            until(come, self.server.log, JOB_SECONDS)
        progress: dict[str, Any] = self.job(id_)["progress"]
        return progress

    def ended(self, id_: str, name: str) -> Ended:
        """It must have succeeded, left one version that serves, and count once in the ledger of usage."""
        job = self.until(id_, "succeeded", "failed", "cancelled")
        assert job["status"] == "succeeded", (job["error"], self.server.log())
        adapter = self.http.get(f"/v1/adapters/{name}").json()
        assert [version["version"] for version in adapter["versions"]] == [1], adapter
        assert job["fine_tuned_model"] == f"{name}@1"
        usage = self.http.get("/v1/usage", params={"adapter": f"{name}@1"}).json()
        [sums] = [result for bucket in usage["data"] for result in bucket["results"]]
        assert (sums["jobs"], sums["training_tokens"]) == (1, job["trained_tokens"])
        curve = job["evaluation"]["curve"]
        return Ended(adapter["versions"][0]["digest"], [point["valid_loss"] for point in curve])

    def training_process(self) -> psutil.Process | None:
        children = psutil.Process(self.server.pid("worker")).children()
        return children[0] if children else None


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    it = Impatient(str(tiny), tmp_path_factory.mktemp("chaos"), "--threads", "1", "--kv-bytes", str(32 << 20))
    try:
        it.start()
        yield it
        it.stop()
    finally:
        it.end()


@pytest.fixture(scope="module")
def trainings(server: Serving) -> Iterator[Trainings]:
    it = Trainings(server)
    yield it
    it.http.close()


@pytest.fixture(scope="module")
def undisturbed(trainings: Trainings) -> Ended:
    return trainings.ended(trainings.start("undisturbed"), "undisturbed")


def moments(what: str, count: int) -> list[tuple[str, float]]:
    """(victim, when), as `await_moment` has it."""
    rng = random.Random(f"{SEED} {what}")
    return [(what, rng.uniform(0.0, 1.0)) for _ in range(count)]


@pytest.mark.timeout(JOB_SECONDS + 120)
@pytest.mark.parametrize(
    ("victim", "when"),
    moments("worker", KILLS - KILLS // 2) + moments("training", KILLS // 2) + moments("valkey", KILLS // 2),
)
def test_a_kill_changes_nothing(
    victim: str, when: float, trainings: Trainings, undisturbed: Ended, server: Serving
) -> None:
    name = f"{victim}-{when:.5f}"
    id_ = trainings.start(name)
    progress = trainings.await_moment(id_, when)
    if victim == "training":
        child = trainings.training_process()
        if child is not None:
            child.kill()
    else:
        server.kill(victim)
    killed = time.monotonic()
    assert trainings.ended(id_, name) == undisturbed, progress
    log.info("%s killed: %s; done %.1f s later", victim, progress, time.monotonic() - killed)


def test_cancel_is_final_and_publishes_nothing(trainings: Trainings, undisturbed: Ended) -> None:
    id_ = trainings.start("cancelled")
    trainings.await_moment(id_, random.Random(SEED).uniform(STARTING, 0.5))
    child = trainings.training_process()
    answer = trainings.http.post(f"/v1/fine_tuning/jobs/{id_}/cancel")
    assert answer.json()["status"] == "cancelled", answer.text
    if child is not None:
        until(lambda: not alive(child.pid))
    assert trainings.job(id_)["status"] == "cancelled"
    assert trainings.http.get("/v1/adapters/cancelled").status_code == 404


@pytest.mark.timeout(JOB_SECONDS + 120)
def test_paused_and_resumed_it_ends_the_same(trainings: Trainings, undisturbed: Ended) -> None:
    id_ = trainings.start("paused")
    trainings.await_moment(id_, STARTING)
    trainings.http.post(f"/v1/fine_tuning/jobs/{id_}/pause")
    until(lambda: trainings.job(id_)["paused"], trainings.server.log)
    assert trainings.training_process() is None
    trainings.http.post(f"/v1/fine_tuning/jobs/{id_}/resume")
    assert trainings.ended(id_, "paused") == undisturbed
