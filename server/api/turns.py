"""Long work in turns: one piece at a time in all, and nobody's second piece before another's first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from server.errors import DeadlineExceeded


class Turns:
    def __init__(self) -> None:
        self._all = asyncio.Lock()
        self._tenants: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, tenant: str, seconds: float) -> AsyncIterator[None]:
        """The block is this tenant's turn. Raises DeadlineExceeded if waiting and block take longer."""
        lock = self._tenants.setdefault(tenant, asyncio.Lock())  # held by `lock` alone: gone when unused
        try:
            async with asyncio.timeout(seconds), lock, self._all:
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"The request took more than {seconds:g} s.") from None
