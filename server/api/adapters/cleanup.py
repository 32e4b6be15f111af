"""Periodic cleanup: purges adapters deleted long ago, collects abandoned uploads, deletes expired files.

Safe to run in several processes and to be interrupted at any point.
"""

import asyncio
import logging
import random

from adapters_store.registry.registry import Registry
from server.errors import StoreError
from server.files.files import FileStore
from server.finetune.jobs.jobs import Jobs

INTERVAL_SECONDS = 3600.0
RETRY_SECONDS = 60.0  # after a failure
log = logging.getLogger(__name__)


class CleanupLoop:
    """Cleans up at start and then about once an hour."""

    def __init__(self, registry: Registry, files: FileStore, jobs: Jobs) -> None:
        self._registry = registry
        self._files = files
        self._jobs = jobs

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            done = await self._clean_up()
            await asyncio.sleep((INTERVAL_SECONDS if done else RETRY_SECONDS) * random.uniform(0.8, 1.2))  # noqa: S311

    async def _needed(self, tenant: str) -> set[str]:
        """The files of the tenant's unfinished jobs."""
        jobs = await self._jobs.unfinished(tenant)
        return {id_ for job in jobs for id_ in (job.training_file, job.validation_file) if id_}

    async def _clean_up(self) -> bool:
        """Whether it succeeded."""
        try:
            await self._registry.finish_deletes()
            removed = await self._registry.collector.sweep()
            await self._files.delete_expired(self._needed)
            if removed.keys:
                log.info("Removed %d blobs of dead uploads, %d bytes", len(removed.keys), removed.bytes)
        except StoreError as error:
            log.warning("Deleted adapters and dead uploads take up room until the store answers: %s", error)
            return False
        except Exception:
            log.exception("Upkeep failed; what is to be removed stays until the next round")
            return False
        return True
