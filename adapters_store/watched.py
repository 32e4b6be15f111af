"""A client of Valkey that tells how long each call took, a pipeline being one, and whether it failed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import RedisError, ResponseError

OnCall = Callable[[float, bool], None]  # seconds, failed


class Watched(Redis):
    """Tells `on_call`. Assign that once, before use."""

    on_call: OnCall = staticmethod(lambda _seconds, _failed: None)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _told(self.on_call):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "WatchedPipeline":
        made = WatchedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        made.on_call = self.on_call
        return made


class WatchedPipeline(Pipeline):
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
