"""Publishes adapters that are copied into the store as PREFIX/{tenant id}/{name}/, with config and weights.

    pp:watched    hash    tenant/name -> Seen: the files when they were last published or refused

A folder is processed once two successive listings are equal, or at once if it holds a file READY. It goes
through the checks of every upload. A published or refused folder is not processed again until it changes.
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
from adapters_store.valkey import claim, store_errors
from server.api.adapters.publish import AdapterUpload, publish
from server.api.adapters.upload_form import CONFIG
from server.api.http.dependencies import OPERATOR
from server.api.http.temp_files import temp_folder
from server.api.services import Services
from server.audit.entry import Entry, named
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
WEIGHTS = ("adapter_model.safetensors", "adapter.safetensors")  # pickles are not accepted here
CLAIM_SECONDS = 300  # of a folder, by one API process
MAX_TRIES = 3  # after errors that may be the adapter's fault
ACTOR = "watch"
log = logging.getLogger(__name__)


class WatchedFolder(NamedTuple):
    """PREFIX/{tenant}/{name}/"""

    tenant: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


class Seen(msgspec.Struct, frozen=True):
    """The state of a folder when it was last published or refused."""

    stamp: str  # hash of names, sizes and times in the listing
    content: str  # hash of the files' bytes; "" if they were not read


class BucketWatcher:
    """Polls the prefix every `watch_seconds`, in any number of API processes."""

    def __init__(self, deps: Services, prefix: str) -> None:
        """Raises StartupError for a prefix among the store's own keys."""
        if prefix.partition("/")[0] == TENANTS:
            raise StartupError(f"--watch-prefix {prefix!r} must not begin with {TENANTS}.")
        self._deps = deps
        self._prefix = prefix
        self._id = uuid.uuid4().hex
        self._stamps: dict[WatchedFolder, str] = {}  # in the last listing
        self._tries: dict[WatchedFolder, int] = {}

    async def run(self) -> None:
        """Polls until it is cancelled."""
        while True:
            try:
                if self._deps.engine.ready and not self._deps.draining:
                    await self.poll()
            except StoreError as error:
                log.warning("The watched prefix waits: %s", error)
            except Exception:
                log.exception("A look at the watched prefix failed")
            await asyncio.sleep(self._deps.settings.watch_seconds)

    async def poll(self) -> None:
        """Process every folder that is complete and has changed."""
        folders = await self._list_folders()
        await self._forget_removed(folders)
        stamps: dict[WatchedFolder, str] = {}
        for folder, files in folders.items():
            config_and_weights = [CONFIG, *(name for name in WEIGHTS if name in files)]
            if CONFIG not in files or len(config_and_weights) != 2:
                continue
            try:
                heads = [
                    await self._deps.objects.head(self._key(folder, name)) for name in config_and_weights
                ]
            except NotFound:  # being replaced
                continue
            stamps[folder] = stamp = _stamp(config_and_weights, heads)
            stable = READY in files or self._stamps.get(folder) == stamp
            seen = await self._seen(folder)
            if stable and (seen is None or seen.stamp != stamp) and await self._claim(folder):
                renewing = asyncio.create_task(self._renew_claim(folder))
                try:
                    size = sum(head.bytes for head in heads)
                    await self._process(folder, config_and_weights[1], size, stamp, seen)
                finally:
                    renewing.cancel()
        self._stamps = stamps

    async def _process(
        self, folder: WatchedFolder, weights: str, size: int, stamp: str, seen: Seen | None
    ) -> None:
        """Publish the folder, or log why not. After an error that may pass, the next poll tries again."""
        content = seen.content if seen else ""
        try:
            with temp_folder(self._deps.settings) as local:
                files = AdapterUpload((CONFIG, Path(local) / CONFIG), (weights, Path(local) / weights))
                if size > self._deps.settings.max_upload_bytes:
                    limit = self._deps.settings.max_upload_bytes
                    raise TooLarge(f"The files have {size} bytes, more than {limit}.")
                content = await self._download(folder, files)
                if seen is None or seen.content != content:
                    await self._publish(folder, files)
        except Exception as error:
            if self._retries(folder, error):
                log.warning("What was copied to %s waits: %s", folder, error)
                return
            unexpected = None if isinstance(error, PolypeftError) else error
            log.error("What was copied to %s is refused: %s", folder, error, exc_info=unexpected)
        self._tries.pop(folder, None)
        await self._remember(folder, Seen(stamp, content))

    def _retries(self, folder: WatchedFolder, error: Exception) -> bool:
        """Whether to try again. An engine that is lost may have been killed by this adapter: MAX_TRIES."""
        if isinstance(error, PolypeftError) and not isinstance(error, EngineLost):
            return isinstance(error, Unavailable)
        self._tries[folder] = self._tries.get(folder, 0) + 1
        return self._tries[folder] < MAX_TRIES

    async def _download(self, folder: WatchedFolder, files: AdapterUpload) -> str:
        """Fetch the files; returns a hash of their content. Raises InvalidAdapter if one was removed."""
        digests = []
        for name, path in (files.config, files.weights):
            try:
                await self._deps.objects.download(self._key(folder, name), path, None)
            except NotFound:
                raise InvalidAdapter("A file went away while it was read.") from None
            digests.append(await run_sync(sha256_of, path))
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    async def _publish(self, folder: WatchedFolder, files: AdapterUpload) -> None:
        deps = self._deps
        tenant = OPERATOR if folder.tenant == OPERATOR.id else await deps.tenants.get(folder.tenant)
        if await self._is_latest(folder, files):  # published by a process that crashed before _remember
            return
        entry = Entry(actor=ACTOR, by="server", action="adapter.upload", target=named(folder.name))
        async with deps.audit.change(uuid.uuid4().hex, tenant.id, entry):
            version = await publish(deps, tenant, folder.name, files, actor=ACTOR)
        log.info("What was copied to %s is version %d", folder, version.version)

    async def _is_latest(self, folder: WatchedFolder, files: AdapterUpload) -> bool:
        """Whether the newest version of the adapter has these files."""
        try:
            latest = (await self._deps.registry.get(*folder)).versions[-1]
            manifest = await self._deps.registry.manifest(*folder, latest.version)
        except NotFound:
            return False
        published = {blob.sha256 for blob in manifest.files}
        return published == {await run_sync(sha256_of, path) for _, path in (files.config, files.weights)}

    async def _list_folders(self) -> dict[WatchedFolder, set[str]]:
        """The names of the files in each folder under the prefix."""
        folders: dict[WatchedFolder, set[str]] = {}
        for key in await self._deps.objects.list(self._prefix):
            match key.removeprefix(f"{self._prefix}/").split("/"):
                case [tenant, name, file] if is_name(tenant) and is_name(name):
                    folders.setdefault(WatchedFolder(tenant, name), set()).add(file)
        return folders

    def _key(self, folder: WatchedFolder, file: str) -> str:
        return f"{self._prefix}/{folder}/{file}"

    async def _seen(self, folder: WatchedFolder) -> Seen | None:
        with store_errors():
            record = await self._deps.redis.hget(WATCHED, str(folder))
        return None if record is None else msgspec.json.decode(record, type=Seen)

    async def _remember(self, folder: WatchedFolder, seen: Seen) -> None:
        with store_errors():
            await self._deps.redis.hset(WATCHED, str(folder), msgspec.json.encode(seen))

    async def _forget_removed(self, folders: dict[WatchedFolder, set[str]]) -> None:
        """Drop the records of folders that no longer exist, so that one copied there again is new."""
        with store_errors():
            known: Any = await self._deps.redis.hkeys(WATCHED)
            gone = {field.decode() for field in known} - {str(folder) for folder in folders}
            if gone:
                await self._deps.redis.hdel(WATCHED, *gone)

    async def _claim(self, folder: WatchedFolder) -> bool:
        """Whether this process may publish the folder: with two at once it would be published twice."""
        return await claim(self._deps.redis, f"{WATCHED}:{folder}", self._id, CLAIM_SECONDS)

    async def _renew_claim(self, folder: WatchedFolder) -> None:
        """Keep the claim until cancelled: the engine may take longer than CLAIM_SECONDS."""
        while True:
            await asyncio.sleep(CLAIM_SECONDS / 3)
            with suppress(RedisError):
                await self._deps.redis.expire(f"{WATCHED}:{folder}", CLAIM_SECONDS)


def _stamp(names: list[str], heads: list[Head]) -> str:
    lines = [f"{name} {head.bytes} {head.modified!r}" for name, head in zip(names, heads, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
