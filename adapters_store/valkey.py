"""The one way to reach Valkey: a client with time-outs and one layer of retries, and its failures as ours.

Knows no key and no record: registry and tenants each own theirs. A command may run twice when its first
answer was lost, so every write built on this client is idempotent.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    ConnectionError,  # noqa: A004 - redis names them so
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from server.errors import InsufficientStorage, StoreError

OnCall = Callable[[float, bool], None]  # seconds, failed


class InstrumentedRedis(Redis):
    """Tells `on_call`. Assign that once, before use."""

    on_call: OnCall = staticmethod(lambda _seconds, _failed: None)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _told(self.on_call):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "InstrumentedPipeline":
        made = InstrumentedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        made.on_call = self.on_call
        return made


class InstrumentedPipeline(Pipeline):
    on_call: OnCall = staticmethod(lambda _seconds, _failed: None)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _told(self.on_call):
            return await super().execute(raise_on_error)


@contextmanager
def _told(on_call: OnCall) -> Iterator[None]:
    start, failed = time.perf_counter(), False
    try:
        yield
    except ResponseError:  # an answer, and scripts ask for some (NOSCRIPT)
        raise
    except RedisError:
        failed = True
        raise
    finally:
        on_call(time.perf_counter() - start, failed)


CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 5.0
MAX_CONNECTIONS = 64
# How Valkey refuses a write, and only a write: its file cannot be written, it has no memory left, or `serve`
# has told it to take none while its disk is full (see server/supervisor/disk_reserve.py).
NO_ROOM = ("MISCONF", "NOREPLICAS")


class Pool(BlockingConnectionPool):
    """redis-py's pool, made safe against callers that go away.

    Cancelled while it hands a connection back, a caller there keeps its place in the pool for ever;
    cancelled as it is woken, it takes the wake-up along. Either way the pool ends up starved. And cancelled
    just as its command is sent, it goes on as if nothing were: Python 3.11's wait_for swallows that.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cancels: dict[AbstractConnection, int] = {}  # of who has the connection, before it asked

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        before = _cancels()
        try:
            connection = await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
        except BaseException:
            await asyncio.shield(self._wake_next())
            raise
        self._cancels[connection] = before
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        before = self._cancels.pop(connection, 0)
        await asyncio.shield(super().release(connection))
        if _cancels() > before:
            raise asyncio.CancelledError

    async def _wake_next(self) -> None:
        async with self._condition:
            self._condition.notify()


def _cancels() -> int:
    """How often the running task was asked to stop."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def connect(url: str) -> InstrumentedRedis:
    """A client for redis://, rediss:// or unix:// URLs; opens no connection yet.

    A cancelled command's connection is closed, never handed to the next caller with an answer pending.
    More callers than connections wait in line, at most ANSWER_SECONDS.
    """
    pool = Pool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=ANSWER_SECONDS,
        socket_timeout=ANSWER_SECONDS,
        socket_connect_timeout=CONNECT_SECONDS,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=2),
        retry_on_error=[ConnectionError, TimeoutError],
        decode_responses=False,
    )
    client = InstrumentedRedis(connection_pool=pool)
    client.auto_close_connection_pool = True  # it is nobody else's
    return client


@contextmanager
def store_errors() -> Iterator[None]:
    """Valkey's failures as StoreError (503): its being down lets nobody in and makes nothing unknown.

    A write that it has no room for is InsufficientStorage (507); it is done by none of its halves.
    """
    try:
        yield
    except ResponseError as error:
        if isinstance(error, OutOfMemoryError) or any(code in str(error) for code in NO_ROOM):
            raise InsufficientStorage from error
        raise StoreError("The control store did not answer; try again.") from error
    except RedisError as error:
        raise StoreError("The control store did not answer; try again.") from error


def text(value: object) -> str:
    """What Valkey answers, which its client's types leave open."""
    return value.decode() if isinstance(value, bytes) else str(value)
