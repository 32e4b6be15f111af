"""The index of versions, in Valkey. Knows no object store; what it says of versions, manifests say too.

    pp:adapters:{tenant}                   sorted set   adapter names
    pp:adapters:{tenant}:last              hash         name -> highest version ever; outlives the adapter
    pp:adapters:{tenant}:bytes             string       of all its versions, deleted ones included; counted
                                                        anew where it is missing
    pp:adapter:{tenant}:{name}:versions    hash         version -> Version
    pp:adapter:{tenant}:{name}:aliases     hash         alias -> what it points at, see alias_target.py
    pp:adapter:{tenant}:{name}:state       hash         revision, tag:{alias}: ETags; pin: of `latest`;
                                                        undo:{alias}: what it was before, newest first;
                                                        lost:{alias}: waits for its version to be restored
    pp:adapter:{tenant}:{name}:history     list         Entry, newest first
    pp:adapter:{tenant}:{name}:deleted     hash         version -> Gone
    pp:deleted:{tenant}                    sorted set   names with deleted versions
    pp:deleted                             sorted set   manifests of deleted versions, by when (ms)
    pp:deleting                            set          manifest#token: see deletions.py
    pp:staged                              sorted set   blobs no version has yet, see blob_leases.py
    pp:once:{token}                        string       what a change answered

`latest` is the highest version that was promoted, or else the lowest there is: it follows from the versions
and the pin alone, in whatever order they come back.
"""

import uuid
from typing import Any, Literal

import msgspec
from redis.asyncio import Redis

from adapters_store.alias_target import AliasTarget, from_text, to_text
from adapters_store.audit_log import KEPT_SECONDS, MAX_ENTRIES, AuditEntry, decode_entry
from adapters_store.index import lua_changes as changes
from adapters_store.index import lua_prelude as scripts
from adapters_store.index.records import Adapter, Deleted, Gone, Standing, Version, adapter_of, deleted_of
from adapters_store.names import ManifestKey, deleted_key, manifest_prefix, parse_manifest_key
from adapters_store.valkey import store_errors

MAX_UNDO = 10  # times that an alias can be rolled back
DELETED = "pp:deleted"
DELETING = "pp:deleting"
STAGED = "pp:staged"

VersionState = Literal["live", "deleted", "none"]


class Index:
    """All calls raise StoreError when Valkey does not answer. What changes something has an `actor`.

    `condition`: "", or "absent", "*", or ETags joined by commas, of which one must be current.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        limits = {"undo": MAX_UNDO, "history": MAX_ENTRIES, "history_seconds": KEPT_SECONDS}
        self._scripts = {
            change: redis.register_script(scripts.once(change, **limits))
            for change in (
                changes.ADD,
                changes.ADD_GONE,
                changes.ALIAS,
                changes.UNALIAS,
                changes.ROLLBACK,
                changes.REMOVE,
                changes.PURGE,
                changes.RESTORE,
            )
        }
        self._find = redis.register_script(scripts.FIND)
        self._settled = redis.register_script(scripts.SETTLED)

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
        """done, "too many" adapters, "too many bytes", "deleted": was here before, "expired": its blobs may
        be lost.

        What is not `new` is there already, and its blobs are. All but the newest `keep` are deleted.
        """
        record = msgspec.json.encode(version)
        place = version.tenant, version.name
        return await self._do(
            changes.ADD,
            place,
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
        place = gone.version.tenant, gone.version.name
        entry = msgspec.json.encode(gone)
        await self._do(changes.ADD_GONE, place, "server", gone.version.version, entry, gone.deleted)

    async def alias(
        self,
        tenant: str,
        name: str,
        alias: str,
        to: AliasTarget,
        actor: str,
        condition: str,
        max_aliases: int,
    ) -> str:
        """done, unknown, changed, "no version", "too many". `latest` is pinned."""
        args = alias, to_text(to), max_aliases, condition
        return await self._do(changes.ALIAS, (tenant, name), actor, *args)

    async def unalias(self, tenant: str, name: str, alias: str, actor: str, condition: str) -> str:
        """done, unknown, changed. `latest` goes back to what it would be without its pin."""
        return await self._do(changes.UNALIAS, (tenant, name), actor, alias, condition)

    async def rollback(self, tenant: str, name: str, alias: str, actor: str, condition: str) -> str:
        """done, unknown, changed, nothing."""
        return await self._do(changes.ROLLBACK, (tenant, name), actor, alias, condition)

    async def remove(
        self, tenant: str, name: str, version: int | None, actor: str, condition: str = "", *, purge: bool
    ) -> list[Version] | str:
        """Delete one version or all, and what points there alone; those that were, or unknown, or changed."""
        only = "" if version is None else version
        answer = await self._do(changes.REMOVE, (tenant, name), actor, only, int(purge), condition)
        if answer in ("unknown", "changed"):
            return answer
        return msgspec.json.decode(answer, type=list[Version])

    async def purge(
        self, tenant: str, name: str, version: int | None, actor: str, cutoff: float | None = None
    ) -> int:
        """Let go of deleted versions: of one or all, or of those deleted before `cutoff` (Unix seconds)."""
        only = "" if version is None else version
        milliseconds = 2**53 if cutoff is None else int(cutoff * 1000)
        return int(await self._do(changes.PURGE, (tenant, name), actor, only, milliseconds))

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
        """done, unknown, "too many" adapters, "too many versions"."""
        only = "" if version is None else version
        return await self._do(
            changes.RESTORE, (tenant, name), actor, only, max_adapters, max_versions, max_aliases
        )

    async def find(
        self, tenant: str, name: str, selector: int | str
    ) -> tuple[AliasTarget | None, dict[int, Version]]:
        """By number or by alias, in one round trip: what the alias says, and the versions that may answer."""
        kind = "alias" if isinstance(selector, str) else "version"
        keys = _records(tenant, name)[:2]
        with store_errors():
            text, *records = await self._find(keys=keys, args=[selector, kind])
        found = [msgspec.json.decode(record, type=Version) for record in records if record]
        return from_text(text.decode()) if text else None, {version.version: version for version in found}

    async def standing(self, tenant: str, name: str) -> Standing:
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                transaction.hget(_last(tenant), name)
                transaction.hlen(_records(tenant, name)[0])
                transaction.zcard(_names(tenant))
                transaction.get(_bytes(tenant))
                last, versions, adapters, total = await transaction.execute()
        return Standing(int(last or 0), versions, adapters, int(total or 0))

    async def forget_bytes(self) -> None:
        """Every tenant's are counted anew when it publishes next."""
        with store_errors():
            async for key in self._redis.scan_iter(_bytes("*")):
                await self._redis.delete(key)

    async def adapters(self, tenant: str, names: list[str]) -> list[Adapter]:
        """Those that exist, in the order asked; each is one consistent moment."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                for name in names:
                    for key in _records(tenant, name)[:3]:
                        transaction.hgetall(key)
                answers = await transaction.execute()
        hashes = zip(names, answers[::3], answers[1::3], answers[2::3], strict=True)
        return [adapter_of(tenant, name, *three) for name, *three in hashes if three[0]]

    async def deleted(self, tenant: str, names: list[str]) -> list[Deleted]:
        """Those that have deleted versions, in the order asked."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                for name in names:
                    transaction.hgetall(_records(tenant, name)[4])
                answers = await transaction.execute()
        return [deleted_of(name, found) for name, found in zip(names, answers, strict=True) if found]

    async def names(self, tenant: str, after: str | None, limit: int, *, deleted: bool = False) -> list[str]:
        """In alphabetical (byte) order."""
        start = "-" if after is None else f"({after}"
        key = f"{DELETED}:{tenant}" if deleted else _names(tenant)
        with store_errors():
            found: Any = await self._redis.zrangebylex(key, start, "+", start=0, num=limit)
        return [name.decode() for name in found]

    async def history(self, tenant: str, name: str) -> list[AuditEntry]:
        with store_errors():
            records: Any = await self._redis.lrange(_records(tenant, name)[3], 0, -1)
        return [decode_entry(record) for record in records]

    async def tenants(self, *, deleted: bool = False) -> list[str]:
        """Every tenant that has an adapter, or a deleted one."""
        prefix = f"{DELETED}:" if deleted else _names("")
        with store_errors():
            keys = [key.decode() async for key in self._redis.scan_iter(f"{prefix}*", _type="zset")]
        return sorted({key.removeprefix(prefix) for key in keys})

    async def place(self, key: ManifestKey) -> tuple[VersionState, Gone | None]:
        """Where the index says that a version is."""
        versions, gone = _records(key.tenant, key.name)[0::4]
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                transaction.hexists(versions, str(key.version))
                transaction.hget(gone, str(key.version))
                live, entry = await transaction.execute()
        if entry is not None:
            return "deleted", msgspec.json.decode(entry, type=Gone)
        return ("live" if live else "none"), None

    async def due(self, cutoff: float, limit: int) -> list[ManifestKey]:
        """Versions deleted before `cutoff` (Unix seconds), the oldest first."""
        with store_errors():
            keys: Any = await self._redis.zrange(
                DELETED, 0, int(cutoff * 1000), byscore=True, offset=0, num=limit
            )
        places = [parse_manifest_key(key.decode()) for key in keys]
        return [place for place in places if place is not None]

    async def deleting(self) -> set[str]:
        with store_errors():
            members: Any = await self._redis.smembers(DELETING)
        return {member.decode() for member in members}

    async def settled(self, key: ManifestKey, place: VersionState, member: str) -> bool:
        """Forget the task `member`. False if the version has moved since: look again."""
        versions, gone = _records(key.tenant, key.name)[0::4]
        with store_errors():
            return bool(
                await self._settled(keys=[versions, gone, DELETING], args=[key.version, place, member])
            )

    async def _do(self, change: str, place: tuple[str, str], actor: str, *args: bytes | str | int) -> str:
        """Run a change once, though the command may be sent again."""
        tenant, name = place
        token = uuid.uuid4().hex
        keys = [_names(tenant), _last(tenant), *_records(tenant, name)]
        keys += [f"{DELETED}:{tenant}", DELETED, DELETING, STAGED, f"pp:once:{token}", _bytes(tenant)]
        with store_errors():
            answer: bytes = await self._scripts[change](
                keys=keys, args=[token, actor, name, manifest_prefix(tenant, name), *args]
            )
        return answer.decode()


def mark_of(gone: Gone) -> tuple[str, bytes]:
    """Where the store says that a version is deleted, and what it says there."""
    version = gone.version
    key = deleted_key(version.tenant, version.name, version.version)
    return key, msgspec.json.encode({"deleted": gone.deleted})


def _names(tenant: str) -> str:
    return f"pp:adapters:{tenant}"


def _bytes(tenant: str) -> str:
    return f"pp:adapters:{tenant}:bytes"


def _last(tenant: str) -> str:
    return f"pp:adapters:{tenant}:last"


def _records(tenant: str, name: str) -> list[str]:
    """versions, aliases, state, history, deleted."""
    stem = f"pp:adapter:{tenant}:{name}"
    return [f"{stem}:{kind}" for kind in ("versions", "aliases", "state", "history", "deleted")]
