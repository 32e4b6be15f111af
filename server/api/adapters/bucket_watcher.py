"""Publishes adapters that are copied into the store: PREFIX/{tenant id}/{name}/ with config and weights.

    pp:watched    hash    tenant/name -> Seen: what lay there when it was last taken or refused

What lies there is taken once it looks the same twice, or at once beside a file READY. It goes through the
gate of every upload. What was refused is not tried again until it changes; nor is what was published.
"""

import asyncio
import hashlib
import logging
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from anyio.to_thread import run_sync
from redis.exceptions import RedisError

from adapters_store.names import TENANTS, is_name
from adapters_store.object_store.store import Head, sha256_of
from adapters_store.valkey import store_errors
from server.api.adapters.publish import AdapterUpload, publish
from server.api.adapters.upload_form import CONFIG
from server.api.http.dependencies import OPERATOR
from server.api.http.temp_files import temp_folder
from server.api.services import Services
from server.errors import (
    EngineLost,
    InvalidAdapter,
    NotFound,
    PolypeftError,
    StartupError,
    StoreError,
    TooLarge,
    Unavailable,
)

WATCHED = "pp:watched"
READY = "READY"
WEIGHTS = (
    "adapter_model.safetensors",
    "adapter.safetensors",
)  # no pickle, from nobody
CLAIM_SECONDS = 300
MAX_TRIES = 3  # of what breaks in a way that waiting does not heal
ACTOR = "watch"
log = logging.getLogger(__name__)


class WatchedFolder(NamedTuple):
    tenant: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


class Seen(msgspec.Struct, frozen=True):
    stamp: str  # of the listing
    content: str  # of the bytes


class BucketWatcher:
    def __init__(self, deps: Services, prefix: str) -> None:
        """Raises StartupError for a prefix where other things lie."""
        if prefix.partition("/")[0] == TENANTS:
            raise StartupError(f"--watch-prefix {prefix!r} must not begin with {TENANTS}.")
        self._deps = deps
        self._prefix = prefix
        self._id = uuid.uuid4().hex
        self._stamps: dict[WatchedFolder, str] = {}  # at the last look
        self._tries: dict[WatchedFolder, int] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if self._deps.engine.ready and not self._deps.draining:
                    await self.look()
            except StoreError as error:
                log.warning("The watched prefix waits: %s", error)
            except Exception:
                log.exception("A look at the watched prefix failed")
            await asyncio.sleep(self._deps.settings.watch_seconds)

    async def look(self) -> None:
        """Take what has come and is complete."""
        places = await self._places()
        await self._forget(places)
        stamps: dict[WatchedFolder, str] = {}
        for place, files in places.items():
            config_and_weights = [CONFIG, *(name for name in WEIGHTS if name in files)]
            if CONFIG not in files or len(config_and_weights) != 2:
                continue
            try:
                heads = [await self._deps.objects.head(self._key(place, name)) for name in config_and_weights]
            except NotFound:  # being replaced
                continue
            stamps[place] = stamp = _stamp(config_and_weights, heads)
            stable = READY in files or self._stamps.get(place) == stamp
            seen = await self._seen(place)
            if stable and (seen is None or seen.stamp != stamp) and await self._claim(place):
                keeping = asyncio.create_task(self._keep(place))
                try:
                    await self._take(place, config_and_weights[1], sum(h.bytes for h in heads), stamp, seen)
                finally:
                    keeping.cancel()
        self._stamps = stamps

    async def _take(
        self, place: WatchedFolder, weights: str, size: int, stamp: str, seen: Seen | None
    ) -> None:
        """Publish it, or say why not. What may go better later is tried at the next look."""
        content = seen.content if seen else ""
        try:
            with temp_folder(self._deps.settings) as folder:
                files = AdapterUpload((CONFIG, Path(folder) / CONFIG), (weights, Path(folder) / weights))
                if size > self._deps.settings.max_upload_bytes:
                    limit = self._deps.settings.max_upload_bytes
                    raise TooLarge(f"The files have {size} bytes, more than {limit}.")
                content = await self._fetch(place, files)
                if seen is None or seen.content != content:
                    await self._publish(place, files)
        except Exception as error:
            if self._again(place, error):
                log.warning("What was copied to %s waits: %s", place, error)
                return
            ours = None if isinstance(error, PolypeftError) else error
            log.error("What was copied to %s is refused: %s", place, error, exc_info=ours)
        self._tries.pop(place, None)
        await self._remember(place, Seen(stamp, content))

    def _again(self, place: WatchedFolder, error: Exception) -> bool:
        """Whether to try again; an engine that is lost may be lost by this very adapter."""
        if isinstance(error, PolypeftError) and not isinstance(error, EngineLost):
            return isinstance(error, Unavailable)
        self._tries[place] = self._tries.get(place, 0) + 1
        return self._tries[place] < MAX_TRIES

    async def _fetch(self, place: WatchedFolder, files: AdapterUpload) -> str:
        """The content's own name. Raises InvalidAdapter if it is gone again."""
        digests = []
        for name, path in (files.config, files.weights):
            try:
                await self._deps.objects.download(self._key(place, name), path, None)
            except NotFound:
                raise InvalidAdapter("A file went away while it was read.") from None
            digests.append(await run_sync(sha256_of, path))
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    async def _publish(self, place: WatchedFolder, files: AdapterUpload) -> None:
        deps = self._deps
        tenant = OPERATOR if place.tenant == OPERATOR.id else await deps.tenants.get(place.tenant)
        if await self._is_latest(place, files):  # whoever took it died before it could say so
            return
        version = await publish(deps, tenant, place.name, files, actor=ACTOR)
        log.info("What was copied to %s is version %d", place, version.version)

    async def _is_latest(self, place: WatchedFolder, files: AdapterUpload) -> bool:
        try:
            latest = (await self._deps.registry.get(*place)).versions[-1]
            manifest = await self._deps.registry.manifest(*place, latest.version)
        except NotFound:
            return False
        kept = {blob.sha256 for blob in manifest.files}
        return kept == {await run_sync(sha256_of, path) for _, path in (files.config, files.weights)}

    async def _places(self) -> dict[WatchedFolder, set[str]]:
        """The names of the files in each folder that could be an adapter's."""
        found: dict[WatchedFolder, set[str]] = {}
        for key in await self._deps.objects.list(self._prefix):
            match key.removeprefix(f"{self._prefix}/").split("/"):
                case [tenant, name, file] if is_name(tenant) and is_name(name):
                    found.setdefault(WatchedFolder(tenant, name), set()).add(file)
        return found

    def _key(self, place: WatchedFolder, file: str) -> str:
        return f"{self._prefix}/{place}/{file}"

    async def _seen(self, place: WatchedFolder) -> Seen | None:
        with store_errors():
            record = await self._deps.redis.hget(WATCHED, str(place))
        return None if record is None else msgspec.json.decode(record, type=Seen)

    async def _remember(self, place: WatchedFolder, seen: Seen) -> None:
        with store_errors():
            await self._deps.redis.hset(WATCHED, str(place), msgspec.json.encode(seen))

    async def _forget(self, places: dict[WatchedFolder, set[str]]) -> None:
        """Of folders that are gone: what comes there again is new."""
        with store_errors():
            known: Any = await self._deps.redis.hkeys(WATCHED)
            gone = {field.decode() for field in known} - {str(place) for place in places}
            if gone:
                await self._deps.redis.hdel(WATCHED, *gone)

    async def _claim(self, place: WatchedFolder) -> bool:
        """Of several API processes one takes it. Saves work; two at once would publish it twice."""
        with store_errors():
            holder = await self._deps.redis.set(
                f"{WATCHED}:{place}", self._id, nx=True, get=True, ex=CLAIM_SECONDS
            )
        return holder in (None, self._id.encode())

    async def _keep(self, place: WatchedFolder) -> None:
        """The claim, for as long as the engine takes to try what is there."""
        while True:
            await asyncio.sleep(CLAIM_SECONDS / 3)
            with suppress(RedisError):
                await self._deps.redis.expire(f"{WATCHED}:{place}", CLAIM_SECONDS)


def _stamp(names: list[str], heads: list[Head]) -> str:
    lines = [f"{name} {head.bytes} {head.modified!r}" for name, head in zip(names, heads, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
