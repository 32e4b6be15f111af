"""The client of Valkey: time-outs, one layer of retries, call metrics, and translation of its failures.

Knows no key and no record: registry and tenants each own theirs. A command may run twice if its first answer
was lost, so every write through this client is idempotent.
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

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 5.0
MAX_CONNECTIONS = 64
# Error codes of writes that Valkey has no space for: its file cannot be written, or `serve` has configured it
# to refuse writes while its disk is full (server/supervisor/disk_reserve.py). Lack of memory has a class.
NO_SPACE_CODES = ("MISCONF", "NOREPLICAS")
OnCall = Callable[[float, bool], None]  # seconds, failed


class InstrumentedRedis(Redis):
    """Calls `on_call` after each command or pipeline. Assign it once, before use."""

    on_call: OnCall = staticmethod(lambda _seconds, _failed: None)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _reported(self.on_call):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "InstrumentedPipeline":
        pipeline = InstrumentedPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )
        pipeline.on_call = self.on_call
        return pipeline


class InstrumentedPipeline(Pipeline):
    """Calls `on_call` once for all its commands."""

    on_call: OnCall = staticmethod(lambda _seconds, _failed: None)

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _reported(self.on_call):
            return await super().execute(raise_on_error)


@contextmanager
def _reported(on_call: OnCall) -> Iterator[None]:
    start, failed = time.perf_counter(), False
    try:
        yield
    except ResponseError:  # an answer, and part of the protocol of scripts (NOSCRIPT)
        raise
    except RedisError:
        failed = True
        raise
    finally:
        on_call(time.perf_counter() - start, failed)


class Pool(BlockingConnectionPool):
    """redis-py's pool, made safe against the cancellation of callers.

    In redis-py, a caller that is cancelled while it returns a connection occupies it for ever, and one that
    is cancelled while it is woken loses the wake-up for the next; either starves the pool. A caller that is
    cancelled while its command is sent goes on uncancelled: Python 3.11's wait_for swallows the cancellation.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cancels: dict[AbstractConnection, int] = {}  # cancellations of its holder before it asked

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
    """Cancellation requests of the running task so far."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def connect(url: str) -> InstrumentedRedis:
    """A client for redis://, rediss:// or unix:// URLs; opens no connection yet.

    The connection of a cancelled command is closed, because its answer is still pending. Callers beyond
    MAX_CONNECTIONS wait for at most ANSWER_SECONDS.
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
    client.auto_close_connection_pool = True  # the pool has no other user
    return client


@contextmanager
def store_errors() -> Iterator[None]:
    """Translate Valkey's failures to StoreError (503): no caller is let in or gets "not found" by an outage.

    A write that it has no space for, which is not done at all, becomes InsufficientStorage (507).
    """
    try:
        yield
    except ResponseError as error:
        if isinstance(error, OutOfMemoryError) or any(code in str(error) for code in NO_SPACE_CODES):
            raise InsufficientStorage from error
        raise StoreError("The control store did not answer; try again.") from error
    except RedisError as error:
        raise StoreError("The control store did not answer; try again.") from error


async def claim(redis: Redis, key: str, holder: str, seconds: float) -> bool:
    """Whether `holder` has the claim `key` now, which expires after `seconds`. Raises StoreError."""
    with store_errors():
        found = await redis.set(key, holder, nx=True, get=True, px=int(seconds * 1000))
    return found in (None, holder.encode())


def text(value: object) -> str:
    """A value of Valkey's as str; the client types it loosely."""
    return value.decode() if isinstance(value, bytes) else str(value)
