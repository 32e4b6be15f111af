"""Room that is kept for Valkey's file, and what becomes of writes when it is used up."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from server.errors import InsufficientStorage
from server.supervisor import disk_reserve as reserve
from server.supervisor.disk_reserve import (
    AUTO_REWRITE,
    REFUSE_BELOW_BYTES,
    REFUSE_WRITES,
    RESERVED_BYTES,
    DiskReserve,
    State,
    keep_reserve,
)
from server.tenancy.limits import NO_LIMITS
from server.tenancy.tenants import Tenants


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Valkey's newest append-only file, beside the one before."""
    folder = tmp_path / "appendonlydir"
    folder.mkdir()
    for number in (9, 10):
        (folder / f"appendonly.aof.{number}.incr.aof").write_bytes(b"*1\r\n" * 10)
    return folder / "appendonly.aof.10.incr.aof"


def ahead(file: Path) -> int:
    return file.stat().st_blocks * 512 - file.stat().st_size


def test_blocks_lie_behind_the_end_of_the_newest_file(tmp_path: Path, file: Path) -> None:
    assert DiskReserve(tmp_path).refill() == "whole"
    assert file.read_bytes() == b"*1\r\n" * 10, "as long as it was"
    assert ahead(file) >= RESERVED_BYTES - 4096
    assert ahead(file.with_name("appendonly.aof.9.incr.aof")) < REFUSE_BELOW_BYTES


def test_a_full_disk_is_written_to_until_the_reserve_is_nearly_used_up(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DiskReserve(tmp_path).refill() == "whole"
    monkeypatch.setattr(reserve, "_reserve", lambda _descriptor: False)
    seen = []
    for _ in range(4):
        seen.append(DiskReserve(tmp_path).refill())
        with file.open("ab") as end:
            end.write(bytes(RESERVED_BYTES // 3))
    assert seen == ["whole", "shrinking", "shrinking", "used up"]
    monkeypatch.undo()
    assert DiskReserve(tmp_path).refill() == "whole"


def test_where_blocks_cannot_be_reserved_the_disk_itself_is_looked_at(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(_descriptor: int) -> bool:
        raise NotImplementedError

    monkeypatch.setattr(reserve, "_reserve", unsupported)
    for free, state in (
        (1 << 30, "whole"),
        (REFUSE_BELOW_BYTES, "shrinking"),
        (REFUSE_BELOW_BYTES - 1, "used up"),
    ):
        usage = shutil._ntuple_diskusage(1 << 40, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder, usage=usage: usage)
        assert DiskReserve(tmp_path).refill() == state


def test_where_there_is_no_file_yet_writes_are_taken(tmp_path: Path) -> None:
    assert DiskReserve(tmp_path).refill() == "whole"


class Disk(DiskReserve):
    def __init__(self) -> None:
        self.state: State = "whole"

    def refill(self) -> State:
        return self.state


@asynccontextmanager
async def kept(redis: Redis, disk: Disk) -> AsyncIterator[None]:
    task = asyncio.create_task(keep_reserve(redis, disk))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(redis: Redis, option: str, value: str) -> None:
    for _ in range(1000):
        if (await redis.config_get(option))[option] == value:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it was not told")


@pytest.mark.anyio
async def test_without_room_writes_are_refused_as_a_whole_and_reads_go_on(redis: Redis) -> None:
    tenants, disk = Tenants(redis), Disk()
    tenant, secret = await tenants.create("before")
    async with kept(redis, disk):
        disk.state = "shrinking"
        await until(redis, AUTO_REWRITE, "0")
        assert await tenants.add_key(tenant.id)
        disk.state = "used up"
        await until(redis, REFUSE_WRITES, "1")
        for write in (tenants.create("full"), tenants.add_key(tenant.id)):
            with pytest.raises(InsufficientStorage):
                await write
        caller = await tenants.authenticate(secret)
        assert caller is not None
        assert (caller.tenant, caller.limits) == (tenant, NO_LIMITS)
        assert [found.name for found in await tenants.list()] == ["before"]
        disk.state = "whole"
        await until(redis, REFUSE_WRITES, "0")
        await until(redis, AUTO_REWRITE, "100")
        assert await tenants.create("after")
