"""What has to be done now and then beside the API: purge what was deleted long ago, collect dead uploads.

May run in several processes, and end at any point.
"""

import asyncio
import logging
import random

from adapters_store.registry.registry import Registry
from server.errors import StoreError

SECONDS = 3600.0
RETRY_SECONDS = 60.0
log = logging.getLogger(__name__)


class CleanupLoop:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def run(self) -> None:
        """Until cancelled: at start, and about once an hour."""
        while True:
            done = await self._once()
            await asyncio.sleep((SECONDS if done else RETRY_SECONDS) * random.uniform(0.8, 1.2))  # noqa: S311

    async def _once(self) -> bool:
        try:
            await self._registry.finish_deletes()
            found = await self._registry.collector.collect_expired()
            if found.keys:
                log.info("Removed %d blobs of dead uploads, %d bytes", len(found.keys), found.bytes)
        except StoreError as error:
            log.warning("Deleted adapters and dead uploads take up room until the store answers: %s", error)
            return False
        except Exception:
            log.exception("Upkeep failed; what is to be removed stays until the next round")
            return False
        return True
