"""Tenants' files, and uploads in parts: whole or absent, one tenant's alone, their bytes gone with them."""

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from adapters_store.object_store.store import Objects
from adapters_store.upload_records import KEPT_SECONDS, LIFE_SECONDS
from adapters_store.valkey import text
from server.errors import Conflict, InvalidField, NotFound, PolypeftError, QuotaExceeded, StoreError
from server.files.files import File, FileStore
from server.files.uploads import Upload, Uploads
from tests.fixtures.faults import Failing
from tests.fixtures.services import held_to

pytestmark = pytest.mark.anyio
TEN = b"0123456789"


@pytest.fixture
def files(redis: Redis, objects: Objects) -> FileStore:
    return FileStore(redis, objects, max_files=3, limits_of=held_to(file_bytes=40))


@pytest.fixture
def uploads(redis: Redis, objects: Objects, files: FileStore) -> Uploads:
    return Uploads(redis, objects, files, max_bytes=30, max_pending=2)


@pytest.fixture
def source(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / hashlib.sha256(data).hexdigest()
        path.write_bytes(data)
        return path

    return write


Source = Callable[[bytes], Path]


async def add(
    files: FileStore, source: Source, data: bytes = TEN, tenant: str = "t", name: str = "a.jsonl"
) -> File:
    sha256 = hashlib.sha256(data).hexdigest()
    return await files.add(tenant, source(data), name, sha256, size=len(data), purpose="fine-tune")


async def part(uploads: Uploads, upload: Upload, source: Source, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    return (await uploads.add_part("t", upload.id, source(data), len(data), sha256)).id


async def age(redis: Redis) -> None:
    """Everything doomed is due."""
    due = {text(key): 1 for key in await redis.zrange("pp:doomed", 0, -1)}
    if due:
        await redis.zadd("pp:doomed", due)


async def test_a_file_comes_back_as_it_was(
    files: FileStore, source: Source, tmp_path: Path, redis: Redis
) -> None:
    file = await add(files, source, name="ünïcode data.jsonl")
    assert await files.get("t", file.id) == file
    assert (file.bytes, file.name, file.purpose) == (10, "ünïcode data.jsonl", "fine-tune")
    await files.download(file, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == TEN
    assert await redis.zcard("pp:doomed") == 0


async def test_a_deleted_files_bytes_are_gone(files: FileStore, source: Source, objects: Objects) -> None:
    kept, gone = await add(files, source), await add(files, source)
    await files.delete("t", gone.id)
    assert await objects.list("tenants") == [kept.key]
    assert await files.list("t") == [kept]
    with pytest.raises(NotFound):
        await files.delete("t", gone.id)


async def test_others_files_and_unknown_ones_are_one_answer(files: FileStore, source: Source) -> None:
    file = await add(files, source, tenant="owner")
    for call in (files.get, files.delete):
        answers = set()
        for tenant, id_ in [("other", file.id), ("owner", "file-x"), ("other", "file-x")]:
            with pytest.raises(NotFound) as caught:
                await call(tenant, id_)
            answers.add((caught.value.code, caught.value.message.replace(id_, "")))
        assert len(answers) == 1
    assert await files.list("other") == []
    assert await files.get("owner", file.id) == file


async def test_an_expired_file_is_hidden_then_deleted_unless_a_job_needs_it(
    files: FileStore, source: Source, objects: Objects, redis: Redis
) -> None:
    sha256 = hashlib.sha256(TEN).hexdigest()
    kept = await add(files, source)
    file = await files.add("t", source(TEN), "a.jsonl", sha256, size=10, purpose="fine-tune", life=3600)
    needed: set[str] = {file.id}

    async def of_jobs(_tenant: str) -> set[str]:
        return needed

    assert (await files.get("t", file.id)).expires == file.created + 3600
    assert await files.delete_expired(of_jobs) == 0
    record = msgspec.json.encode(msgspec.structs.replace(file, expires=1))
    await redis.hset("pp:files:t", file.id, record)
    await redis.zadd("pp:files:expiring", {f"t/{file.id}": 1, "t/file-gone": 1})
    with pytest.raises(NotFound):
        await files.get("t", file.id)
    assert await files.list("t") == [kept]
    assert await files.delete_expired(of_jobs) == 0
    assert (await files.get("t", file.id, expired=True)).id == file.id
    needed.clear()
    assert await files.delete_expired(of_jobs) == 1
    assert await objects.list("tenants") == [kept.key]
    assert await redis.zcard("pp:files:expiring") == 0


async def test_caps_count_files_and_bytes(files: FileStore, source: Source, objects: Objects) -> None:
    await add(files, source, TEN * 3)
    for data in (TEN * 2, TEN):
        with pytest.raises(QuotaExceeded, match="40 bytes"):
            await add(files, source, TEN * 2)
        await files.check_quota("t", len(data)) if len(data) == 10 else None
    await add(files, source, b"1")
    two = await add(files, source, b"2")
    with pytest.raises(QuotaExceeded, match="3 files"):
        await add(files, source, b"3")
    with pytest.raises(QuotaExceeded, match="3 files"):
        await files.check_quota("t", 1)
    assert len(await objects.list("tenants")) == 3, "what was refused is not kept"
    await files.delete("t", two.id)
    await add(files, source, b"3")
    await add(files, source, TEN, tenant="u")


async def test_of_parallel_uploads_exactly_the_cap_fits(
    files: FileStore, source: Source, objects: Objects
) -> None:
    got = await asyncio.gather(*(add(files, source) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(one, File) for one in got) == 3
    assert len(await objects.list("tenants")) == 3


async def test_results_always_fit_and_come_once(files: FileStore, source: Source, objects: Objects) -> None:
    for _ in range(3):
        await add(files, source)
    for _ in range(2):
        path, sha256 = source(TEN * 5), hashlib.sha256(TEN * 5).hexdigest()
        await files.add(
            "t", path, "metrics.csv", sha256, size=50, purpose="fine-tune-results", id_="file-result"
        )
    assert len(await files.list("t")) == 4
    await files.delete("t", "file-result")
    for file in await files.list("t"):
        await files.delete("t", file.id)
    await files.check_quota("t", 40)
    assert await objects.list("tenants") == []


@pytest.mark.parametrize("name", ["", "a/b", "..\\x", "a\x00", "a\nb", "x" * 256])
async def test_names_are_only_shown(files: FileStore, uploads: Uploads, source: Source, name: str) -> None:
    with pytest.raises(InvalidField, match="filename"):
        await add(files, source, name=name)
    with pytest.raises(InvalidField, match="filename"):
        await uploads.create("t", name, 10, "fine-tune")


@pytest.mark.parametrize("after", [False, True])
async def test_a_store_that_fails_anywhere_leaves_no_bytes_behind(
    redis: Redis, objects: Objects, source: Source, tmp_path: Path, after: bool
) -> None:
    for at in range(1, 12):
        await redis.flushall()
        failing = Failing(objects, at, after=after)
        files = FileStore(redis, failing, max_files=3, limits_of=held_to(file_bytes=40))  # type: ignore[arg-type]
        uploads = Uploads(redis, failing, files, max_bytes=30, max_pending=2)  # type: ignore[arg-type]
        try:
            await files.delete("t", (await add(files, source)).id)
            upload = await uploads.create("t", "a", 4, "fine-tune")
            ids = [await part(uploads, upload, source, data) for data in (b"ab", b"cd")]
            folder = tmp_path / f"{after}{at}"
            folder.mkdir()
            await uploads.complete("t", upload.id, ids, None, folder)
        except PolypeftError as error:
            assert isinstance(error, StoreError)  # noqa: PT017 - the others pass
        healthy = FileStore(redis, objects)
        await age(redis)
        await healthy.scheduled_deletes.sweep()
        kept = [file.key for file in await healthy.list("t")]
        assert await objects.list("tenants") == kept
        for file in await healthy.list("t"):
            await healthy.delete("t", file.id)
    assert failing.calls < at, "every call has had its turn to fail"


async def test_parts_make_a_file_in_the_order_asked(
    uploads: Uploads, files: FileStore, objects: Objects, source: Source, tmp_path: Path, redis: Redis
) -> None:
    upload = await uploads.create("t", "big.jsonl", 9, "fine-tune")
    assert (upload.status, upload.expires - upload.created) == ("pending", 3600)
    third, first, second = [await part(uploads, upload, source, data) for data in (b"ghi", b"abc", b"def")]
    md5 = hashlib.md5(b"abcdefghi").hexdigest()
    done, file = await uploads.complete("t", upload.id, [first, second, third], md5.upper(), tmp_path)
    assert (done.status, done.file) == ("completed", file.id)
    assert (file.name, file.bytes, file.sha256) == ("big.jsonl", 9, hashlib.sha256(b"abcdefghi").hexdigest())
    await files.download(file, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"abcdefghi"
    assert await objects.list("tenants") == [file.key], "the parts are gone"
    again, same = await uploads.complete("t", upload.id, [first, second, third], md5.upper(), tmp_path)
    assert (again, same) == (done, file)
    for call in (
        lambda: uploads.complete("t", upload.id, [first], None, tmp_path),
        lambda: uploads.cancel("t", upload.id),
        lambda: part(uploads, upload, source, b"x"),
    ):
        with pytest.raises(Conflict, match="completed"):
            await call()


async def test_parts_that_do_not_fit_are_refused_by_name(
    uploads: Uploads, source: Source, tmp_path: Path
) -> None:
    upload = await uploads.create("t", "a", 6, "fine-tune")
    one, two = [await part(uploads, upload, source, data) for data in (b"abc", b"defg")]
    wrong = [
        ([one], "3 bytes"),
        ([one, two], "7 bytes"),
        ([one, one], "twice"),
        ([one, "part-x"], r"ids\[1\]"),
    ]
    for ids, sentence in wrong:
        with pytest.raises(InvalidField, match=sentence):
            await uploads.complete("t", upload.id, ids, None, tmp_path)
    three = await part(uploads, upload, source, b"def")
    with pytest.raises(InvalidField, match="md5"):
        await uploads.complete("t", upload.id, [one, three], "0" * 32, tmp_path)
    with pytest.raises(InvalidField, match="twice the 6 bytes"):
        await part(uploads, upload, source, b"defg")
    (tmp_path / "again").mkdir()
    _, file = await uploads.complete("t", upload.id, [one, three], None, tmp_path / "again")
    assert file.bytes == 6


async def test_uploads_are_capped_and_end(
    uploads: Uploads, files: FileStore, objects: Objects, source: Source, redis: Redis, tmp_path: Path
) -> None:
    for size in (0, 31):
        with pytest.raises(InvalidField, match="1 to 30"):
            await uploads.create("t", "a", size, "fine-tune")
    first, second = [await uploads.create("t", "a", 10, "fine-tune") for _ in range(2)]
    with pytest.raises(QuotaExceeded, match="2 uploads"):
        await uploads.create("t", "a", 10, "fine-tune")
    await part(uploads, first, source, TEN)
    assert (await uploads.cancel("t", first.id)).status == "cancelled"
    assert (await uploads.cancel("t", first.id)).status == "cancelled"
    assert await objects.list("tenants") == []
    ten = await part(uploads, second, source, TEN)
    await redis.hset(f"pp:upload:t:{second.id}", "expires", 1)
    await redis.zadd("pp:uploads:t", {second.id: 1})
    assert (await uploads.get("t", second.id)).status == "expired"
    with pytest.raises(Conflict, match="expired"):
        await uploads.complete("t", second.id, [ten], None, tmp_path)
    await uploads.create("t", "a", 10, "fine-tune")
    await age(redis)
    await files.scheduled_deletes.sweep()
    assert await objects.list("tenants") == []
    assert 0 < await redis.ttl(f"pp:upload:t:{first.id}") <= LIFE_SECONDS + KEPT_SECONDS


async def test_others_uploads_and_unknown_ones_are_one_answer(
    uploads: Uploads, source: Source, tmp_path: Path
) -> None:
    upload = await uploads.create("t", "a", 10, "fine-tune")
    for id_ in (upload.id, "upload_x", "x:parts", "", "*"):
        with pytest.raises(NotFound, match="no upload"):
            await uploads.get("other", id_)
        with pytest.raises(NotFound, match="no upload"):
            await uploads.cancel("other", id_)
        with pytest.raises(NotFound, match="no upload"):
            await uploads.complete("other", id_, [], None, tmp_path)


async def test_of_parallel_completions_one_file_remains(
    uploads: Uploads, files: FileStore, objects: Objects, source: Source, tmp_path: Path
) -> None:
    upload = await uploads.create("t", "a", 10, "fine-tune")
    ten = await part(uploads, upload, source, TEN)

    async def complete(number: int) -> str:
        folder = tmp_path / str(number)
        folder.mkdir()
        return (await uploads.complete("t", upload.id, [ten], None, folder))[1].id

    got = await asyncio.gather(*(complete(number) for number in range(3)))
    ids = set(got)
    assert len(ids) == 1
    assert [file.id for file in await files.list("t")] == list(ids)
    assert len(await objects.list("tenants")) == 1
