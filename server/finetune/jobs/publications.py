"""The publisher's side of a job: exactly one version for one training, however many publishers die at it.

A publisher commits the job to one version number by `intend` before that version can exist; only that number
is ever written for it, and the registry writes a number once.
"""

import msgspec

from adapters_store.valkey import store_errors, text
from server.finetune.jobs import transitions_lua as lua
from server.finetune.jobs.job import JobError, new_event
from server.finetune.jobs.record_store import Records, key

CLAIM_SECONDS = 30.0


class Publications(Records):
    async def to_publish(self) -> list[str]:
        """Jobs whose training is finished, the oldest first."""
        with store_errors():
            return [text(id_) for id_ in await self._redis.zrange("pp:jobs:publishing", 0, -1)]

    async def claim(self, id_: str, publisher: str) -> bool:
        """Whether this publisher may try it for CLAIM_SECONDS. Saves work; two at once would do no harm."""
        with store_errors():
            holder = await self._redis.set(
                f"{key(id_)}:claim", publisher, nx=True, get=True, px=int(CLAIM_SECONDS * 1000)
            )
        return holder in (None, publisher.encode())

    async def waits(self, id_: str, publisher: str, why: str) -> bool:
        """Give the claim up to another publisher, and tell the tenant why it waits; whether that is news."""
        return bool(await self._run(lua.WAITS, id_, publisher, why, new_event("warn", why)))

    async def tried(self, id_: str) -> int:
        """Count one more try that broke; how many there were."""
        with store_errors():
            return int(await self._redis.hincrby(key(id_), "tries", 1))

    async def intend(self, id_: str, previous: int, version: int) -> int | None:
        """Commit the job to `version` if it is committed to `previous` (0: none yet).

        Returns what it is committed to now: nothing else may be published for it. None: it is over.
        From here on it cannot be cancelled.
        """
        answer = int(await self._run(lua.INTEND, id_, previous or "", version))
        return None if answer < 0 else answer

    async def succeed(self, id_: str, version: int, model: str, files: list[str], *events: bytes) -> bool:
        """The intended version is published. False if the job ended otherwise: then it must not exist."""
        record = msgspec.json.encode(files)
        return bool(await self._run(lua.SUCCEED, id_, version, model, record, *events))

    async def reject(self, id_: str, error: JobError) -> bool:
        """It cannot be published: the job has failed."""
        record = msgspec.json.encode(error)
        return bool(await self._run(lua.REJECT, id_, record, new_event("error", error.message)))
