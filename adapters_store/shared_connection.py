"""One connection that concurrent callers share: what they ask at a time goes out in one write.

For scripts that are on every request's way: a connection of the pool costs each caller more than the script
itself. A caller that is cancelled loses its answer, and the connection goes on.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

from adapters_store.valkey import InstrumentedRedis

Command = tuple[Any, ...]  # words, as redis-py packs them


class SharedConnection:
    """Of the pool of `redis`, from its first use on. Raises redis-py's errors, as `redis` itself would."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._connection: AbstractConnection | None = None
        self._asked: list[tuple[Command, asyncio.Future[Any]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def run(self, script: AsyncScript, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """The script's answer. It may run twice if its first answer was lost."""
        start, failed = time.perf_counter(), False
        rest = (len(keys), *keys, *args)
        try:
            try:
                return await self._ask(("EVALSHA", script.sha, *rest))
            except NoScriptError:
                return await self._ask(("EVAL", script.script, *rest))
            except NoConnection:  # it was idle, and Valkey has closed it or started anew
                return await self._ask(("EVAL", script.script, *rest))
        except ResponseError:
            raise
        except RedisError:
            failed = True
            raise
        finally:
            if isinstance(self._redis, InstrumentedRedis):
                self._redis.on_call(time.perf_counter() - start, failed)

    async def close(self) -> None:
        """Give the connection back to the pool, which closes it."""
        if self._sender is not None:
            self._sender.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)
            await self._redis.connection_pool.release(connection)

    def _ask(self, command: Command) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        self._asked.append((command, future))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())
        return future

    async def _send_all(self) -> None:
        """Send what was asked, and what is asked meanwhile."""
        try:
            while self._asked:
                asked, self._asked = self._asked, []
                try:
                    await self._exchange(asked)
                except (RedisError, OSError) as error:
                    if self._connection is not None:
                        await self._connection.disconnect(nowait=True)
                    for _command, future in asked:
                        if not future.done():
                            future.set_exception(
                                error if isinstance(error, RedisError) else NoConnection(str(error))
                            )
        finally:
            self._sender = None

    async def _exchange(self, asked: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        connection = self._connection
        if connection is None:
            connection = self._connection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        packed = connection.pack_commands([command for command, _future in asked])
        await connection.send_packed_command(packed, check_health=False)
        for _command, future in asked:
            answer = await _answer(connection)
            if future.done():
                continue
            if isinstance(answer, RedisError):
                future.set_exception(answer)
            else:
                future.set_result(answer)


async def _answer(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
