"""An adapter's aliases: where they point, and how they are moved, by one caller at a time if it wants.

Knows the index only. Every StoreError means "try again".
"""

from adapters_store import names
from adapters_store.alias_target import AliasTarget
from adapters_store.index.index import Index
from adapters_store.index.records import Alias
from server.errors import Conflict, InvalidField, ModelNotFound, PreconditionFailed, QuotaExceeded, shown

MAX_ALIASES = 100  # of one adapter


class Aliases:
    """`actor` is who does it, for the history; `condition` is what must hold, as the index takes it."""

    def __init__(self, index: Index) -> None:
        self._index = index

    async def get(self, tenant: str, name: str, alias: str) -> Alias:
        adapters = await self._index.adapters(tenant, [name]) if names.is_name(name) else []
        found = adapters[0].alias(alias) if adapters else None
        if found is None:
            raise unknown(f"{name}@{alias}")
        return found

    async def set(
        self,
        tenant: str,
        name: str,
        alias: str,
        points: AliasTarget,
        *,
        actor: str = "server",
        condition: str = "",
    ) -> None:
        """Point `alias` at a version, or at several by weight, wherever it pointed before.

        `latest` is pinned: it stays at that version until it is unset, or a newer version is published.
        """
        names.check_alias(alias)
        if alias == names.LATEST and not isinstance(points, int):
            raise InvalidField("alias 'latest' takes one version, no weights.", param="weights")
        done = "unknown"
        if names.is_name(name):
            done = await self._index.alias(tenant, name, alias, points, actor, condition, MAX_ALIASES)
        if done == "too many":
            raise QuotaExceeded(f"Adapter {shown(name)} has {MAX_ALIASES} aliases, the most it may.")
        if done == "changed":
            raise _changed(alias)
        if done != "done":
            raise unknown(f"{name}@{await self._missing(tenant, name, points)}")

    async def unset(
        self, tenant: str, name: str, alias: str, *, actor: str = "server", condition: str = ""
    ) -> None:
        """Forget the alias; of `latest`, forget that it is pinned. Raises NotFound if there is none."""
        done = "unknown"
        if names.is_name(name) and names.is_name(alias):
            done = await self._index.unalias(tenant, name, alias, actor, condition)
        if done != "done":
            raise _changed(alias) if done == "changed" else unknown(f"{name}@{alias}")

    async def rollback(
        self, tenant: str, name: str, alias: str, *, actor: str = "server", condition: str = ""
    ) -> None:
        """Point `alias` where it pointed before it was last moved; each call goes one step further back.

        `latest` is pinned there. Raises Conflict when no earlier state is known, of versions that still are.
        """
        done = "unknown"
        if names.is_name(name) and names.is_name(alias):
            done = await self._index.rollback(tenant, name, alias, actor, condition)
        if done == "nothing":
            raise Conflict(f"alias {shown(alias)} has no earlier state to roll back to.", param="alias")
        if done != "done":
            raise _changed(alias) if done == "changed" else unknown(f"{name}@{alias}")

    async def _missing(self, tenant: str, name: str, points: AliasTarget) -> int:
        """The first version that is not there: of an unknown adapter, the first."""
        adapters = await self._index.adapters(tenant, [name]) if names.is_name(name) else []
        there = {version.version for adapter in adapters for version in adapter.versions}
        asked = [points] if isinstance(points, int) else sorted(points)
        return next((version for version in asked if version not in there), asked[0])


def _changed(alias: str) -> PreconditionFailed:
    return PreconditionFailed(f"alias {shown(alias)} is not as the request's condition says.", param="alias")


def unknown(model: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model {shown(model)} does not exist or you do not have access to it.", param="model"
    )
