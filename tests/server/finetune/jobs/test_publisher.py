"""One training, one version: whatever dies, and whenever; and who decides where `latest` points."""

import hashlib
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from adapters_store.manifest import Blob, Manifest
from adapters_store.object_store.store import Objects
from adapters_store.registry.registry import Registry
from server.errors import (
    Conflict,
    EngineLost,
    InvalidAdapter,
    NotFound,
    PolypeftError,
    StoreError,
    Unavailable,
)
from server.files.files import FileStore
from server.finetune.jobs import publisher
from server.finetune.jobs import transitions_lua as job_scripts
from server.finetune.jobs.job import Job, JobError, StoredFile, result_prefix
from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.publisher import Publisher
from tests.fixtures.jobs import RECIPE, fixed, result, taken
from tests.fixtures.services import held_to

pytestmark = pytest.mark.anyio
ID = "ftjob-1"


class Killed(BaseException):
    """The process died here: nothing of it runs on, no handler and no clean-up."""


@dataclass
class Gate:
    """What the API's gate is, without an engine: stages the blobs, says yes, or `error`."""

    registry: Registry
    error: PolypeftError | None = None
    ready: bool = True
    base_digest: str = "b" * 64
    seen: list[tuple[str, str]] = field(default_factory=list)

    def folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory()

    async def prepare(self, tenant: str, name: str, version: int, files: list[Path]) -> Manifest:
        self.seen.append((tenant, name))
        if self.error:
            raise self.error
        blobs = await self.registry.stage(tenant, [(path.name, path) for path in files])
        return manifest(tenant, name, version, blobs, self.base_digest)


def manifest(
    tenant: str, name: str, version: int, blobs: list[Blob], base_digest: str = "b" * 64
) -> Manifest:
    return Manifest(
        tenant=tenant,
        name=name,
        version=version,
        method="lora",
        base="toy",
        base_digest=base_digest,
        digest="d",
        files=blobs,
        config={},
        tensors={},
        facts={"rank": 4},
        created=1,
    )


class System:
    """A publisher with its own connections to the same stores."""

    def __init__(self, redis: Redis, objects: Any, max_adapters: int = 10) -> None:
        self.redis, self.objects = redis, objects
        self.jobs = Jobs(redis)
        self.files = FileStore(redis, objects)
        self.registry = Registry(objects, redis, held_to(adapters=max_adapters))
        self.gate = Gate(self.registry)
        self.publisher = Publisher(self.jobs, self.files, self.registry, objects, self.gate)

    async def trained(self, id_: str = ID, *, better: bool | None = True, **fields: Any) -> Job:
        """A job whose training is finished, its files in the store."""
        await self.jobs.create(fixed(id_, **fields))
        job = await taken(self.jobs, id_)
        adapter = [await self.put(job, name) for name in ("adapter_config.json", "adapter_model.safetensors")]
        reports = [await self.put(job, name) for name in ("loss.png", "metrics.csv")]
        found = result(adapter, reports, better=better, evaluation={"loss": 1.0})
        assert await self.jobs.trained(id_, job.fence, found)
        return job

    async def put(self, job: Job, name: str) -> StoredFile:
        data, key = f"{job.id} {name}".encode(), f"{result_prefix(job, job.fence)}/{name}"
        sha256 = hashlib.sha256(data).hexdigest()
        await self.objects.put(key, data, sha256)
        return StoredFile(name, key, sha256, len(data))

    async def upload(self) -> int:
        """Somebody else's version of the same adapter, as the API publishes it."""
        blobs = await self.registry.stage("t", [("adapter_model.safetensors", Path(__file__))])
        number = await self.registry.next_version("t", "mine")
        try:
            await self.registry.publish(manifest("t", "mine", number, blobs))
        except Conflict:
            number = await self.registry.next_version("t", "mine")
            await self.registry.publish(manifest("t", "mine", number, blobs))
        return number

    async def versions(self, name: str = "mine") -> list[int]:
        try:
            return [version.version for version in (await self.registry.get("t", name)).versions]
        except NotFound:
            return []

    async def unclaim(self, id_: str = ID) -> None:
        """As if the claim of a publisher that died had expired."""
        await self.redis.delete(f"pp:job:{id_}:claim")


@pytest.fixture(autouse=True)
def _without_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "MAX_DELAY_SECONDS", 0.0)


@pytest.fixture
def system(redis: Redis, objects: Objects) -> System:
    return System(redis, objects)


async def test_a_trained_job_becomes_a_version(system: System) -> None:
    job = await system.trained()
    await system.publisher.publish_all()
    now = await system.jobs.get("t", job.id)
    assert (now.status, now.version, now.fine_tuned_model) == ("succeeded", 1, "mine@1")
    found = await system.registry.manifest("t", "mine", 1)
    assert (found.facts["job"], found.facts["rank"], found.evaluation) == (job.id, 4, {"loss": 1.0})
    files = [await system.files.get("t", id_) for id_ in now.result_files]
    assert [(file.name, file.purpose) for file in files] == [
        ("metrics.csv", "fine-tune-results"),
        ("loss.png", "fine-tune-results"),
    ]
    assert await system.objects.get(files[0].key) == f"{ID} metrics.csv".encode()
    said = [event.message for event in await system.jobs.events(job.id)]
    assert said[-2:] == ["New fine-tuned model created: mine@1", "The job has successfully completed"]


async def test_what_a_job_wrote_goes_some_time_after_it_ended(system: System, redis: Redis) -> None:
    await system.trained()
    await system.publisher.publish_all()
    due = f"tenants/t/jobs/{ID}/"
    score = await redis.zscore("pp:doomed", due)
    assert score is not None
    assert abs(score / 1000 - time.time() - job_scripts.DELETE_AFTER_SECONDS) < 60
    await redis.zadd("pp:doomed", {due: 1})
    await system.files.scheduled_deletes.sweep()
    left = {key.split("/")[2] for key in await system.objects.list("tenants")}
    assert left == {"adapters", "blobs", "files"}


@pytest.mark.parametrize(
    ("policy", "better", "latest"),
    [
        *[("if_better", True, 2), ("if_better", None, 2), ("if_better", False, 1)],
        *[("always", False, 2), ("never", True, 1)],
    ],
)
async def test_the_policy_decides_where_latest_points(
    system: System, policy: str, better: bool | None, latest: int
) -> None:
    await system.upload()
    recipe = msgspec.structs.replace(RECIPE, publish=policy)
    await system.trained(better=better, recipe=recipe)
    await system.publisher.publish_all()
    assert (await system.jobs.get("t", ID)).fine_tuned_model == "mine@2"
    adapter = await system.registry.get("t", "mine")
    assert (adapter.aliases["latest"], adapter.latest.version) == (latest, latest)
    assert (await system.registry.resolve("t", "mine", "2")).version == 2
    warned = [event for event in await system.jobs.events(ID) if event.level == "warn"]
    assert len(warned) == (latest == 1)
    await system.registry.rebuild_index()
    assert (await system.registry.get("t", "mine")).aliases["latest"] == latest


async def test_the_first_version_is_latest_however_bad_and_a_better_one_takes_over(system: System) -> None:
    for number, better, latest in [(1, False, 1), (2, False, 1), (3, True, 3), (4, False, 3)]:
        await system.trained(f"ftjob-{number}", better=better)
        await system.publisher.publish_all()
        assert (await system.registry.get("t", "mine")).aliases == {"latest": latest}
    await system.registry.delete("t", "mine", 3)
    assert (await system.registry.get("t", "mine")).aliases == {"latest": 1}


async def test_what_the_gate_refuses_fails_with_its_sentence(system: System) -> None:
    await system.trained()
    system.gate.error = InvalidAdapter("The adapter produced a value that is not finite.")
    await system.publisher.publish_all()
    job = await system.jobs.get("t", ID)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.message) == ("invalid_adapter", system.gate.error.message)
    assert await system.versions() == []


async def test_a_base_that_changed_and_one_adapter_too_many_fail(redis: Redis, objects: Objects) -> None:
    system = System(redis, objects, max_adapters=1)
    await system.trained("ftjob-1", name="a")
    system.gate.base_digest = "c" * 64
    await system.publisher.publish_all()
    system.gate.base_digest = "b" * 64
    await system.trained("ftjob-2", name="a")
    await system.trained("ftjob-3", name="b")
    await system.publisher.publish_all()
    ended = [await system.jobs.get("t", f"ftjob-{number}") for number in (1, 2, 3)]
    assert [job.status for job in ended] == ["failed", "succeeded", "failed"]
    assert [job.error and job.error.code for job in ended] == ["invalid_adapter", None, "quota_exceeded"]


async def test_what_may_heal_is_tried_again_and_what_kills_the_engine_is_not(system: System) -> None:
    await system.trained()
    system.gate.error = Unavailable("The engine is not ready; try again in a moment.")
    for _ in range(publisher.MAX_TRIES + 2):
        await system.publisher.publish_all()
        await system.unclaim()
    assert (await system.jobs.get("t", ID)).phase == "publishing"
    system.gate.error = EngineLost("The engine stopped.")
    for _ in range(publisher.MAX_TRIES):
        assert (await system.jobs.get("t", ID)).phase == "publishing"
        await system.publisher.publish_all()
        await system.unclaim()
    assert (await system.jobs.get("t", ID)).status == "failed"


async def test_files_that_are_not_found_are_waited_for_and_left_to_whoever_has_them(
    system: System, redis: Redis, tmp_path: Path
) -> None:
    """A server that was started with another store must not fail the jobs of all others."""
    await system.trained()
    lost = System(redis, Objects.open((tmp_path / "another").as_uri()))
    for _ in range(publisher.MAX_TRIES + 2):
        await lost.publisher.publish_all()
    job = await system.jobs.get("t", ID)
    assert (job.status, job.phase, job.error) == ("running", "publishing", None)
    events = [event.message for event in await system.jobs.events(ID)]
    assert events.count(publisher.FILES_MISSING) == 1
    await system.publisher.publish_all()
    assert (await system.jobs.get("t", ID)).status == "succeeded"
    assert await system.versions() == [1]


async def test_files_that_come_back_are_published_and_the_wait_can_be_cancelled(
    system: System, objects: Objects
) -> None:
    for id_ in (ID, "ftjob-2"):
        job = await system.trained(id_)
        for file in (job_files := [key for key in await objects.list("tenants") if id_ in key]):
            await objects.delete(file)
        assert job_files
    await system.publisher.publish_all()
    await system.jobs.cancel("t", "ftjob-2")
    job = await system.jobs.get("t", ID)
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.csv", "loss.png"):
        await system.put(job, name)
    await system.publisher.publish_all()
    ended = [(await system.jobs.get("t", id_)).status for id_ in (ID, "ftjob-2")]
    assert ended == ["succeeded", "cancelled"]


async def test_tries_of_what_waits_become_rarer(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waiting = System(system.redis, system.objects)
    await system.trained()
    waiting.gate.error = Unavailable("The engine is not ready; try again in a moment.")
    for _ in range(5):
        await waiting.publisher.publish_all()
    assert len(waiting.gate.seen) == 1


async def test_a_claim_keeps_other_publishers_off(system: System) -> None:
    await system.trained()
    assert await system.jobs.claim(ID, "somebody")
    await system.publisher.publish_all()
    assert (await system.jobs.get("t", ID)).phase == "publishing"


async def test_cancelled_while_it_is_prepared_publishes_nothing(system: System) -> None:
    await system.trained()
    prepare = system.gate.prepare

    async def cancelled_meanwhile(*args: Any) -> Manifest:
        await system.jobs.cancel("t", ID)
        return await prepare(*args)

    system.gate.prepare = cancelled_meanwhile  # type: ignore[assignment, method-assign]
    await system.publisher.publish_all()
    assert (await system.jobs.get("t", ID)).status == "cancelled"
    assert await system.versions() == []
    assert await system.files.list("t") == []


async def test_an_upload_that_takes_the_number_is_stepped_around(system: System) -> None:
    await system.trained()
    prepare = system.gate.prepare

    async def overtaken(*args: Any) -> Manifest:
        found = await prepare(*args)
        await system.upload()
        return found

    system.gate.prepare = overtaken  # type: ignore[assignment, method-assign]
    await system.publisher.publish_all()
    assert (await system.jobs.get("t", ID)).fine_tuned_model == "mine@2"
    assert await system.versions() == [1, 2]


async def test_a_publisher_that_wakes_up_late_adds_nothing(system: System) -> None:
    """It slept between committing and publishing; meanwhile another took over, by an upload's number even."""
    await system.trained()
    assert await system.jobs.commit_to_version(ID, 0, 1) == 1
    job = await system.jobs.get("t", ID)
    late = manifest("t", "mine", 1, [Blob(name="a.safetensors", key="k", sha256="0" * 64, bytes=1)])
    late = msgspec.structs.replace(late, facts={"job": ID})
    await system.upload()
    await system.publisher.publish_all()
    assert (await system.jobs.get("t", ID)).fine_tuned_model == "mine@2"
    for deleted in (False, True):
        if deleted:
            await system.registry.delete("t", "mine", 1)
        sleeper = Publisher(system.jobs, system.files, system.registry, system.objects, system.gate)
        assert await sleeper._commit(job, late) is None
        assert await system.versions() == ([2] if deleted else [1, 2])


async def test_what_was_rejected_meanwhile_is_taken_back(system: System) -> None:
    await system.trained()
    job = await system.jobs.get("t", ID)
    assert job.result is not None
    number = await system.publisher._publish_new(job, job.result, Path(tempfile.mkdtemp()))
    assert number == 1
    assert await system.versions() == [1]
    await system.jobs.reject(ID, JobError("x", "y"))
    await system.publisher._succeed(job, job.result, number)
    assert await system.versions() == []


class Cut:
    """Everything that crosses to Valkey or the object store, until the k-th; there the process dies."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.at, self.after, self.calls = at, after, 0

    async def cross(self, call: Callable[[], Awaitable[Any]]) -> Any:
        self.calls += 1
        if self.calls > self.at or (self.calls == self.at and not self.after):
            raise Killed
        answer = await call()
        if self.calls == self.at:
            raise Killed
        return answer


class CutObjects:
    def __init__(self, objects: Objects, cut: Cut) -> None:
        self._objects, self._cut = objects, cut

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return lambda *args: self._cut.cross(lambda: getattr(self._objects, name)(*args))


@pytest.fixture
def cut_valkey(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Callable[[Cut | None], None]:
    """Puts a cut into every command and transaction of this client; None takes it out."""
    command: Callable[..., Awaitable[Any]] = redis.execute_command
    transaction: Callable[..., Awaitable[Any]] = Pipeline.execute
    current: list[Cut | None] = [None]

    async def cut_command(*args: Any, **options: Any) -> Any:
        cut = current[0]
        return await (cut.cross(lambda: command(*args, **options)) if cut else command(*args, **options))

    async def cut_transaction(self: Any, *args: Any) -> Any:
        cut = current[0]
        if cut is None:
            return await transaction(self, *args)
        return await cut.cross(lambda: transaction(self, *args))

    monkeypatch.setattr(redis, "execute_command", cut_command)
    monkeypatch.setattr(Pipeline, "execute", cut_transaction)
    return lambda cut: current.__setitem__(0, cut)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("uploads", [0, 1])
async def test_death_at_any_point_leaves_exactly_one_version(
    redis: Redis,
    objects: Objects,
    cut_valkey: Callable[[Cut | None], None],
    after: bool,
    uploads: int,
) -> None:
    """`uploads`: one takes the number that the dead publisher had in mind."""
    healthy = System(redis, objects)
    for at in range(1, 200):
        await redis.flushall()
        for key in await objects.list("tenants"):
            await objects.delete(key)
        await healthy.upload()
        await healthy.trained()
        cut = Cut(at, after=after)
        cut_valkey(cut)
        dying = System(redis, CutObjects(objects, cut))
        survived = True
        try:
            await dying.publisher.publish_all()
        except Killed:
            survived = False
        cut_valkey(None)
        for _ in range(uploads):
            await healthy.upload()
        await healthy.unclaim()
        await healthy.publisher.publish_all()
        job = await healthy.jobs.get("t", ID)
        assert job.status == "succeeded", (at, job.error)
        assert await _ours(healthy) == [job.version], at
        assert len(await healthy.versions()) == 2 + uploads
        await healthy.registry.rebuild_index()
        assert await _ours(healthy) == [job.version]
        assert sorted(file.id for file in await healthy.files.list("t")) == sorted(job.result_files)
        if survived:
            break
    else:
        pytest.fail("the publisher never got through")
    assert at > 15, "there were that many points to die at"


async def _ours(system: System) -> list[int]:
    manifests = [await system.registry.manifest("t", "mine", number) for number in await system.versions()]
    return [found.version for found in manifests if found.facts.get("job") == ID]


@pytest.mark.parametrize("seed", range(6))
async def test_failing_stores_are_waited_for(system: System, seed: int) -> None:
    """One call in six fails, before or after it is done: some round gets through, and makes one version."""
    await system.trained()
    flaky = System(system.redis, Flaky(system.objects, seed))
    for _ in range(200):
        await flaky.publisher.publish_all()
        await system.unclaim()
        if (await system.jobs.get("t", ID)).phase == "done":
            break
    assert (await system.jobs.get("t", ID)).status == "succeeded"
    assert await system.versions() == [1]


class Flaky:
    def __init__(self, objects: Objects, seed: int) -> None:
        self._objects, self._draw = objects, random.Random(seed)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any) -> Any:
            fails = self._draw.choice(["before", "after"] + [""] * 10)
            if fails == "before":
                raise StoreError("broken")
            answer = await getattr(self._objects, name)(*args)
            if fails == "after":
                raise StoreError("broken")
            return answer

        return call
