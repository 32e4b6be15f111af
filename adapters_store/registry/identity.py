"""Proof that a Valkey and an object store belong together: both hold the same identity, written once.

    pp:identity      string    in Valkey
    identity.json    object    in the store

If the two differ, this process has been configured with the store or the Valkey of another system. It would
find none of the objects that the index names, and treat them as lost.
"""

import asyncio
import logging
import secrets
from typing import Any

import msgspec
from redis.asyncio import Redis

from adapters_store.index.index import Index
from adapters_store.object_store.store import Objects
from adapters_store.valkey import store_errors
from server.errors import NotFound, StartupError, StoreError, shown

KEY = "pp:identity"
OBJECT = "identity.json"
MAX_DELAY_SECONDS = 15.0
MAX_SAMPLES = 5  # adapters of a tenant that are looked for in the store
log = logging.getLogger(__name__)


class Identity(msgspec.Struct, frozen=True):
    identity: str


async def prove_identity(redis: Redis, objects: Objects) -> None:
    """Write an identity where there is none, and compare the two. Raises StartupError, StoreError.

    The store's identity is written first, and a Valkey without one takes it over: it is new, or about to be
    rebuilt, or older than identities. In the last case the store must hold what the index names.
    """
    with store_errors():
        in_redis: Any = await redis.get(KEY)
    if in_redis is None and not await _holds_indexed_versions(Index(redis), objects):
        raise StartupError(
            "--store and --redis-url do not belong together: the store has none of the adapters that Valkey "
            "names. Name the store that the other servers of this Valkey use."
        )
    in_store = await _in_store(objects)
    if in_store is None and in_redis is None:
        await objects.create(OBJECT, msgspec.json.encode(Identity(secrets.token_hex(16))))
        in_store = await _in_store(objects)
    if in_store is not None and in_redis is None:
        with store_errors():
            await redis.set(KEY, in_store, nx=True)
            in_redis = await redis.get(KEY)
    in_valkey = in_redis.decode() if in_redis else None
    if in_valkey is None or in_valkey != in_store:
        raise StartupError(
            f"--store and --redis-url do not belong together: the store's identity is {shown(in_store)}, "
            f"Valkey's is {shown(in_valkey)}. Name the store that the other servers of this Valkey use; if "
            f"that store has been replaced for good, delete the key {KEY} in Valkey."
        )


async def prove_identity_in_time(redis: Redis, objects: Objects) -> None:
    """Like `prove_identity`, but retries until Valkey and the store answer. Raises StartupError."""
    delay = min(1.0, MAX_DELAY_SECONDS)
    while True:
        try:
            return await prove_identity(redis, objects)
        except StoreError as error:
            log.warning("Whether store and Valkey belong together is not known yet: %s", error.message)
        await asyncio.sleep(delay)
        delay = min(2 * delay, MAX_DELAY_SECONDS)


async def _holds_indexed_versions(index: Index, objects: Objects) -> bool:
    """Whether the store has one of a few versions of the index's first tenant; True for an empty index."""
    names_any = False
    for tenant in await index.tenants():
        for adapter in await index.adapters(tenant, await index.names(tenant, None, MAX_SAMPLES)):
            names_any = True
            try:
                await objects.head(adapter.latest.manifest_key)
            except NotFound:
                continue
            return True
        if names_any:
            break
    return not names_any


async def _in_store(objects: Objects) -> str | None:
    """The store's identity. Raises StartupError for an object of other content."""
    try:
        return msgspec.json.decode(await objects.get(OBJECT), type=Identity).identity
    except NotFound:
        return None
    except msgspec.MsgspecError:
        raise StartupError(f"The object {OBJECT} in the store holds no identity; remove it.") from None
