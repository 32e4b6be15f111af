"""Whether a Valkey and an object store belong together: one identity is written in both, once and for all.

    pp:identity      string    in Valkey
    identity.json    object    in the store

A server or worker whose two identities differ has been pointed at another's store or Valkey. It would find
none of the others' files, and act as if they were lost.
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
LONGEST_DELAY_SECONDS = 15.0
SAMPLES = 5  # versions that are looked for in a store before it is taken for a Valkey's own
log = logging.getLogger(__name__)


class Identity(msgspec.Struct, frozen=True):
    identity: str


async def prove_identity(redis: Redis, objects: Objects) -> None:
    """Write an identity where there is none yet, and compare. Raises StartupError, StoreError.

    The store's is written first. A Valkey that has none takes the store's: it is new, or its index is to be
    rebuilt, or both are from a version before this one; then the store must have what the index names.
    """
    with store_errors():
        known: Any = await redis.get(KEY)
    if known is None and not await _has_what_is_indexed(Index(redis), objects):
        raise StartupError(
            "--store and --redis-url do not belong together: the store has none of the adapters that Valkey "
            "names. Name the store that the other servers of this Valkey use."
        )
    in_store = await _in_store(objects)
    if in_store is None and known is None:
        await objects.create(OBJECT, msgspec.json.encode(Identity(secrets.token_hex(16))))
        in_store = await _in_store(objects)
    if in_store is not None and known is None:
        with store_errors():
            await redis.set(KEY, in_store, nx=True)
            known = await redis.get(KEY)
    in_valkey = known.decode() if known else None
    if in_valkey is None or in_valkey != in_store:
        raise StartupError(
            f"--store and --redis-url do not belong together: the store's identity is {shown(in_store)}, "
            f"Valkey's is {shown(in_valkey)}. Name the store that the other servers of this Valkey use; if "
            f"that store has been replaced for good, delete the key {KEY} in Valkey."
        )


async def prove_identity_in_time(redis: Redis, objects: Objects) -> None:
    """The same, waiting for whichever of them does not answer yet. Raises StartupError."""
    delay = min(1.0, LONGEST_DELAY_SECONDS)
    while True:
        try:
            return await prove_identity(redis, objects)
        except StoreError as error:
            log.warning("Whether store and Valkey belong together is not known yet: %s", error.message)
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_SECONDS)


async def _has_what_is_indexed(index: Index, objects: Objects) -> bool:
    """Whether one of a few versions that the index names is there; also if it names none."""
    names_any = False
    for tenant in await index.tenants():
        for adapter in await index.adapters(tenant, await index.names(tenant, None, SAMPLES)):
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
    """Raises StartupError for an object that is none of ours."""
    try:
        return msgspec.json.decode(await objects.get(OBJECT), type=Identity).identity
    except NotFound:
        return None
    except msgspec.MsgspecError:
        raise StartupError(f"The object {OBJECT} in the store holds no identity; remove it.") from None
