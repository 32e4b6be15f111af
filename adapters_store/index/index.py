"""The index of versions, in Valkey (its keys: keys.py). Knows no object store; manifests can rebuild it.

`latest` is the highest promoted version, or else the lowest version. It depends on the versions and the pin
alone, not on the order in which a rebuild adds them.
"""

import uuid
from typing import Any, Literal

import msgspec
from redis.asyncio import Redis

from adapters_store.alias_target import AliasTarget, from_text, to_text
from adapters_store.history import KEPT_SECONDS, MAX_ENTRIES, HistoryEntry, decode_entry
from adapters_store.index import lua_changes, lua_prelude
from adapters_store.index.keys import (
    DELETED,
    DELETING,
    STAGED,
    adapter_keys,
    answer_key,
    bytes_key,
    deleted_names_key,
    last_number_key,
    names_key,
)
from adapters_store.index.records import Adapter, Deleted, Gone, Usage, Version, adapter_of, deleted_of
from adapters_store.names import ManifestKey, deleted_key, manifest_prefix, parse_manifest_key
from adapters_store.valkey import store_errors

MAX_ROLLBACKS = 10  # of one alias

VersionState = Literal["live", "deleted", "none"]
Found = tuple[AliasTarget | None, dict[int, Version]]


class Index:
    """All calls raise StoreError when Valkey does not answer.

    `actor` is who makes a change, for the history. `condition` is a precondition of a change: "" (none),
    "absent", "*" (exists), or ETags joined by commas, of which one must be current.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        limits = {"undo": MAX_ROLLBACKS, "history": MAX_ENTRIES, "history_seconds": KEPT_SECONDS}
        self._changes = {
            change: redis.register_script(lua_prelude.change_script(change, **limits))
            for change in (
                lua_changes.ADD,
                lua_changes.ADD_GONE,
                lua_changes.ALIAS,
                lua_changes.UNALIAS,
                lua_changes.ROLLBACK,
                lua_changes.REMOVE,
                lua_changes.PURGE,
                lua_changes.RESTORE,
            )
        }
        self._find = redis.register_script(lua_prelude.FIND)
        self._finish_task = redis.register_script(lua_prelude.FINISH_TASK)

    async def add(
        self,
        version: Version,
        blobs: list[str],
        actor: str,
        *,
        new: bool,
        max_adapters: int,
        max_bytes: int,
        keep: int = 0,
    ) -> str:
        """Answers "done", "too many" (adapters), "too many bytes", "deleted" or "expired".

        "deleted": the number was used before; "expired": a blob's lease has ended. A version that is not
        `new` is in the store with all its blobs. `keep` over 0: only the newest `keep` versions, and those
        that aliases point at, are not deleted.
        """
        record = msgspec.json.encode(version)
        adapter = version.tenant, version.name
        return await self._do(
            lua_changes.ADD,
            adapter,
            actor,
            version.version,
            record,
            int(new),
            max_adapters,
            keep,
            max_bytes,
            *blobs,
        )

    async def add_gone(self, gone: Gone) -> None:
        """Add a deleted version, as a rebuild finds it by its mark."""
        adapter = gone.version.tenant, gone.version.name
        entry = msgspec.json.encode(gone)
        await self._do(lua_changes.ADD_GONE, adapter, "server", gone.version.version, entry, gone.deleted)

    async def alias(
        self,
        tenant: str,
        name: str,
        alias: str,
        target: AliasTarget,
        actor: str,
        condition: str,
        max_aliases: int,
    ) -> str:
        """Point `alias` at `target`; `latest` is pinned there.

        Answers "done", "unknown", "changed" (`condition` fails), "no version", "too many" (aliases).
        """
        args = alias, to_text(target), max_aliases, condition
        return await self._do(lua_changes.ALIAS, (tenant, name), actor, *args)

    async def unalias(self, tenant: str, name: str, alias: str, actor: str, condition: str) -> str:
        """Remove `alias`; of `latest`, its pin. Answers "done", "unknown", "changed"."""
        return await self._do(lua_changes.UNALIAS, (tenant, name), actor, alias, condition)

    async def rollback(self, tenant: str, name: str, alias: str, actor: str, condition: str) -> str:
        """Point `alias` at its previous target. Answers "done", "unknown", "changed", "nothing" (earlier)."""
        return await self._do(lua_changes.ROLLBACK, (tenant, name), actor, alias, condition)

    async def remove(
        self, tenant: str, name: str, version: int | None, actor: str, condition: str = "", *, purge: bool
    ) -> list[Version] | str:
        """Delete one version or all, and aliases that point there alone.

        Returns the versions that were deleted, or "unknown", "changed".
        """
        selected = "" if version is None else version
        answer = await self._do(lua_changes.REMOVE, (tenant, name), actor, selected, int(purge), condition)
        if answer in ("unknown", "changed"):
            return answer
        return msgspec.json.decode(answer, type=list[Version])

    async def purge(
        self, tenant: str, name: str, version: int | None, actor: str, cutoff: float | None = None
    ) -> int:
        """Purge one deleted version or all, or those deleted before `cutoff` (Unix seconds); how many."""
        selected = "" if version is None else version
        milliseconds = 2**53 if cutoff is None else int(cutoff * 1000)
        return int(await self._do(lua_changes.PURGE, (tenant, name), actor, selected, milliseconds))

    async def restore(
        self,
        tenant: str,
        name: str,
        version: int | None,
        actor: str,
        *,
        max_adapters: int,
        max_versions: int,
        max_aliases: int,
    ) -> str:
        """Restore one deleted version or all.

        Answers "done", "unknown", "too many" (adapters), "too many versions".
        """
        selected = "" if version is None else version
        return await self._do(
            lua_changes.RESTORE, (tenant, name), actor, selected, max_adapters, max_versions, max_aliases
        )

    async def find(self, tenant: str, name: str, selector: int | str) -> Found:
        """An alias's target (None for a version number) and the versions it names, in one round trip."""
        kind = "alias" if isinstance(selector, str) else "version"
        keys = adapter_keys(tenant, name)[:2]
        with store_errors():
            text, *records = await self._find(keys=keys, args=[selector, kind])
        found = [msgspec.json.decode(record, type=Version) for record in records if record]
        return from_text(text.decode()) if text else None, {version.version: version for version in found}

    async def usage(self, tenant: str, name: str) -> Usage:
        """What counts towards the tenant's limits, and the highest version number of adapter `name`."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                transaction.hget(last_number_key(tenant), name)
                transaction.hlen(adapter_keys(tenant, name)[0])
                transaction.zcard(names_key(tenant))
                transaction.get(bytes_key(tenant))
                last, versions, adapters, total = await transaction.execute()
        return Usage(int(last or 0), versions, adapters, int(total or 0))

    async def forget_bytes(self) -> None:
        """Delete every tenant's sum of bytes; its next change counts it again."""
        with store_errors():
            async for key in self._redis.scan_iter(bytes_key("*")):
                await self._redis.delete(key)

    async def adapters(self, tenant: str, names: list[str]) -> list[Adapter]:
        """Those of `names` that exist, in that order; each one read atomically."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                for name in names:
                    for key in adapter_keys(tenant, name)[:3]:
                        transaction.hgetall(key)
                answers = await transaction.execute()
        hashes = zip(names, answers[::3], answers[1::3], answers[2::3], strict=True)
        return [adapter_of(tenant, name, *three) for name, *three in hashes if three[0]]

    async def deleted(self, tenant: str, names: list[str]) -> list[Deleted]:
        """Those of `names` that have deleted versions, in that order."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                for name in names:
                    transaction.hgetall(adapter_keys(tenant, name)[4])
                answers = await transaction.execute()
        return [deleted_of(name, found) for name, found in zip(names, answers, strict=True) if found]

    async def names(self, tenant: str, after: str | None, limit: int, *, deleted: bool = False) -> list[str]:
        """Up to `limit` names after `after`, in byte order."""
        start = "-" if after is None else f"({after}"
        key = deleted_names_key(tenant) if deleted else names_key(tenant)
        with store_errors():
            found: Any = await self._redis.zrangebylex(key, start, "+", start=0, num=limit)
        return [name.decode() for name in found]

    async def history(self, tenant: str, name: str) -> list[HistoryEntry]:
        """The adapter's history, newest first."""
        with store_errors():
            records: Any = await self._redis.lrange(adapter_keys(tenant, name)[3], 0, -1)
        return [decode_entry(record) for record in records]

    async def tenants(self, *, deleted: bool = False) -> list[str]:
        """Tenants with an adapter, or with `deleted` versions; sorted."""
        prefix = deleted_names_key("") if deleted else names_key("")
        with store_errors():
            keys = [key.decode() async for key in self._redis.scan_iter(f"{prefix}*", _type="zset")]
        return sorted({key.removeprefix(prefix) for key in keys})

    async def state_of(self, key: ManifestKey) -> tuple[VersionState, Gone | None]:
        """A version's state, and its record if it is deleted."""
        versions, gone = adapter_keys(key.tenant, key.name)[0::4]
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                transaction.hexists(versions, str(key.version))
                transaction.hget(gone, str(key.version))
                live, entry = await transaction.execute()
        if entry is not None:
            return "deleted", msgspec.json.decode(entry, type=Gone)
        return ("live" if live else "none"), None

    async def due_for_purge(self, cutoff: float, limit: int) -> list[ManifestKey]:
        """Up to `limit` versions deleted before `cutoff` (Unix seconds), oldest first."""
        with store_errors():
            keys: Any = await self._redis.zrange(
                DELETED, 0, int(cutoff * 1000), byscore=True, offset=0, num=limit
            )
        parsed = [parse_manifest_key(key.decode()) for key in keys]
        return [key for key in parsed if key is not None]

    async def deletion_tasks(self) -> set[str]:
        """`manifest#token` of each task of deletions.py."""
        with store_errors():
            tasks: Any = await self._redis.smembers(DELETING)
        return {task.decode() for task in tasks}

    async def finish_task(self, key: ManifestKey, state: VersionState, task: str) -> bool:
        """Remove `task`, unless the version is in another state than `state` by now: then False."""
        versions, gone = adapter_keys(key.tenant, key.name)[0::4]
        with store_errors():
            return bool(
                await self._finish_task(keys=[versions, gone, DELETING], args=[key.version, state, task])
            )

    async def _do(self, change: str, adapter: tuple[str, str], actor: str, *args: bytes | str | int) -> str:
        """Make a change of one (tenant, name) once, even if the command is sent twice."""
        tenant, name = adapter
        token = uuid.uuid4().hex
        keys = [names_key(tenant), last_number_key(tenant), *adapter_keys(tenant, name)]
        keys += [deleted_names_key(tenant), DELETED, DELETING, STAGED, answer_key(token), bytes_key(tenant)]
        with store_errors():
            answer: bytes = await self._changes[change](
                keys=keys, args=[token, actor, name, manifest_prefix(tenant, name), *args]
            )
        return answer.decode()


def mark_of(gone: Gone) -> tuple[str, bytes]:
    """Key and content of the object that marks a version as deleted in the store."""
    version = gone.version
    key = deleted_key(version.tenant, version.name, version.version)
    return key, msgspec.json.encode({"deleted": gone.deleted})
