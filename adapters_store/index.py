"""The index of published versions, in Valkey. Knows no object store; it can be rebuilt from the manifests.

    pp:adapters:{tenant}                   sorted set   adapter names
    pp:adapters:{tenant}:last              hash         name -> highest version ever; outlives the adapter
    pp:adapter:{tenant}:{name}:versions    hash         version -> Version
    pp:adapter:{tenant}:{name}:aliases     hash         alias -> version
    pp:deleting                            set          manifests of removed versions, still to be removed

`latest` is the highest version that was promoted, or else the lowest there is: it follows from the versions
alone, in whatever order they come back.

Each change is one script: a crash leaves the index before it or after it. Every script may run twice.
"""

from typing import Literal, NamedTuple

import msgspec
from redis.asyncio import Redis

from adapters_store.manifest import Manifest
from adapters_store.names import LATEST, manifest_key, manifest_prefix
from adapters_store.valkey import store_errors

DELETING = "pp:deleting"

LATEST_OF = """
local function latest_of(versions)
  local promoted, lowest = 0, 0
  local all = redis.call('HGETALL', versions)
  for i = 1, #all, 2 do
    local version = tonumber(all[i])
    if cjson.decode(all[i + 1]).promoted ~= false then promoted = math.max(promoted, version) end
    if lowest == 0 or version < lowest then lowest = version end
  end
  return promoted > 0 and promoted or lowest
end
"""

ADD = """
local names, last, versions, aliases = unpack(KEYS)
local name, version, record, max, new = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local highest = tonumber(redis.call('HGET', last, name) or 0)
if new == '1' and tonumber(version) <= highest and redis.call('HEXISTS', versions, version) == 0 then
  return 'deleted'
end
if not redis.call('ZSCORE', names, name) and redis.call('ZCARD', names) >= max then return 'too many' end
redis.call('ZADD', names, 0, name)
redis.call('HSET', versions, version, record)
if tonumber(version) > highest then redis.call('HSET', last, name, version) end
redis.call('HSET', aliases, 'latest', latest_of(versions))
return 'done'
"""

FIND = """
local version = ARGV[1]
if ARGV[2] == 'alias' then version = redis.call('HGET', KEYS[2], version) end
return version and redis.call('HGET', KEYS[1], version)
"""

ALIAS = """
local versions, aliases = unpack(KEYS)
local alias, version, max = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('HEXISTS', versions, version) == 0 then return 'no version' end
local new = redis.call('HEXISTS', aliases, alias) == 0
if new and redis.call('HLEN', aliases) >= max then return 'too many' end
redis.call('HSET', aliases, alias, version)
return 'done'
"""

REMOVE = """
local names, versions, aliases, deleting = unpack(KEYS)
local name, only, prefix = ARGV[1], ARGV[2], ARGV[3]
local removed = {}
for _, version in ipairs(redis.call('HKEYS', versions)) do
  if only == '' or only == version then
    table.insert(removed, redis.call('HGET', versions, version))
    redis.call('HDEL', versions, version)
    redis.call('SADD', deleting, string.format('%s%08d.json', prefix, tonumber(version)))
  end
end
local latest = latest_of(versions)
if latest == 0 then
  redis.call('ZREM', names, name)
  redis.call('DEL', aliases)
  return removed
end
for _, alias in ipairs(redis.call('HKEYS', aliases)) do
  if redis.call('HEXISTS', versions, redis.call('HGET', aliases, alias)) == 0 then
    redis.call('HDEL', aliases, alias)
  end
end
redis.call('HSET', aliases, 'latest', latest)
return removed
"""


class Version(msgspec.Struct, frozen=True):
    """What the index keeps of a manifest: enough to list a version, and to ask the engine for it."""

    tenant: str
    name: str
    version: int
    digest: str
    method: str
    base: str
    manifest_key: str
    sha256: str  # of the weights file, as the tenant uploaded it
    bytes: int  # of all files
    rank: int
    created: int  # Unix seconds
    promoted: bool = True  # `latest` may point here
    evaluated: bool = False  # the manifest says how it compares with the base


class Adapter(msgspec.Struct, frozen=True):
    tenant: str
    name: str
    versions: tuple[Version, ...]  # lowest first, at least one
    aliases: dict[str, int]  # `latest` among them

    @property
    def latest(self) -> Version:
        return next(version for version in self.versions if version.version == self.aliases[LATEST])


def summary(manifest: Manifest) -> Version:
    return Version(
        tenant=manifest.tenant,
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        method=manifest.method,
        base=manifest.base,
        manifest_key=manifest_key(manifest.tenant, manifest.name, manifest.version),
        sha256=manifest.weights.sha256,
        bytes=sum(file.bytes for file in manifest.files),
        rank=int(manifest.facts.get("rank", 0)),
        created=manifest.created,
        promoted=manifest.promoted,
        evaluated=manifest.evaluation is not None,
    )


class Standing(NamedTuple):
    """What decides whether one more version may come, and which."""

    last: int  # the highest version there ever was
    versions: int  # that the adapter has now; 0: there is no such adapter
    adapters: int  # that the tenant has


class Index:
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._add = redis.register_script(LATEST_OF + ADD)
        self._find = redis.register_script(FIND)
        self._alias = redis.register_script(ALIAS)
        self._remove = redis.register_script(LATEST_OF + REMOVE)

    async def add(
        self, version: Version, max_adapters: int, *, new: bool
    ) -> Literal["done", "too many", "deleted"]:
        """Too many: for one more name. Deleted: a version said to be `new` was here before."""
        keys = [_names(version.tenant), _last(version.tenant), *_records(version.tenant, version.name)]
        record = msgspec.json.encode(version)
        with store_errors():
            answer = await self._add(
                keys=keys, args=[version.name, version.version, record, max_adapters, int(new)]
            )
        return _text(answer)  # type: ignore[return-value]  # what the script returns

    async def find(self, tenant: str, name: str, selector: int | str) -> Version | None:
        """By number or by alias, in one round trip."""
        kind = "alias" if isinstance(selector, str) else "version"
        with store_errors():
            record = await self._find(keys=_records(tenant, name), args=[selector, kind])
        return None if record is None else msgspec.json.decode(record, type=Version)

    async def alias(
        self, tenant: str, name: str, alias: str, version: int, max_aliases: int
    ) -> Literal["done", "no version", "too many"]:
        with store_errors():
            answer = await self._alias(keys=_records(tenant, name), args=[alias, version, max_aliases])
        return _text(answer)  # type: ignore[return-value]  # what the script returns

    async def remove(self, tenant: str, name: str, version: int | None) -> list[Version]:
        """Remove one version, or all, and the aliases that point there; the manifests are now `deleting`."""
        keys = [_names(tenant), *_records(tenant, name), DELETING]
        args = [name, "" if version is None else version, manifest_prefix(tenant, name)]
        with store_errors():
            records = await self._remove(keys=keys, args=args)
        return [msgspec.json.decode(record, type=Version) for record in records]

    async def standing(self, tenant: str, name: str) -> Standing:
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                transaction.hget(_last(tenant), name)
                transaction.hlen(_records(tenant, name)[0])
                transaction.zcard(_names(tenant))
                last, versions, adapters = await transaction.execute()
        return Standing(int(last or 0), versions, adapters)

    async def adapters(self, tenant: str, names: list[str]) -> list[Adapter]:
        """Those that exist, in the order asked; each is one consistent moment."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as transaction:
                for name in names:
                    versions, aliases = _records(tenant, name)
                    transaction.hgetall(versions)
                    transaction.hgetall(aliases)
                answers = await transaction.execute()
        pairs = zip(names, answers[::2], answers[1::2], strict=True)
        return [_adapter(tenant, name, versions, aliases) for name, versions, aliases in pairs if versions]

    async def names(self, tenant: str, after: str | None, limit: int) -> list[str]:
        """In alphabetical (byte) order."""
        start = "-" if after is None else f"({after}"
        with store_errors():
            found = await self._redis.zrangebylex(_names(tenant), start, "+", start=0, num=limit)
        return [_text(name) for name in found]

    async def deleting(self) -> set[str]:
        with store_errors():
            return {_text(key) for key in await self._redis.smembers(DELETING)}

    async def deleted(self, keys: list[str]) -> None:
        if keys:
            with store_errors():
                await self._redis.srem(DELETING, *keys)

    async def tenants(self) -> list[str]:
        """Every tenant that has an adapter."""
        prefix = _names("")
        with store_errors():
            keys = [_text(key) async for key in self._redis.scan_iter(f"{prefix}*", _type="zset")]
        return sorted({key.removeprefix(prefix) for key in keys})


def _adapter(tenant: str, name: str, versions: dict[bytes, bytes], aliases: dict[bytes, bytes]) -> Adapter:
    found = [msgspec.json.decode(record, type=Version) for record in versions.values()]
    by_number = tuple(sorted(found, key=lambda version: version.version))
    named = {alias.decode(): int(version) for alias, version in sorted(aliases.items())}
    return Adapter(tenant, name, by_number, {LATEST: by_number[-1].version} | named)


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def _names(tenant: str) -> str:
    return f"pp:adapters:{tenant}"


def _last(tenant: str) -> str:
    return f"pp:adapters:{tenant}:last"


def _records(tenant: str, name: str) -> list[str]:
    return [f"pp:adapter:{tenant}:{name}:versions", f"pp:adapter:{tenant}:{name}:aliases"]
