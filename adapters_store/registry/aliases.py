"""An adapter's aliases: reading and moving them. A `condition` makes a move fail after another caller's.

Knows the index only. Every StoreError means "try again".
"""

from adapters_store import names
from adapters_store.alias_target import AliasTarget
from adapters_store.index.index import Index
from adapters_store.index.records import Alias
from server.errors import Conflict, InvalidField, ModelNotFound, PreconditionFailed, QuotaExceeded, shown

MAX_ALIASES = 100  # of one adapter


class Aliases:
    """`actor`: who makes a change, for the history; `condition`: its precondition, see `Index`."""

    def __init__(self, index: Index) -> None:
        self._index = index

    async def get(self, tenant: str, name: str, alias: str) -> Alias:
        """Raises ModelNotFound."""
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
        target: AliasTarget,
        *,
        actor: str = "server",
        condition: str = "",
    ) -> None:
        """Point `alias`, which need not exist yet, at a version or at several by weight.

        `latest` is pinned: it stays at that version until it is unset, or a newer version is published.
        Raises InvalidField, QuotaExceeded, PreconditionFailed, ModelNotFound.
        """
        names.check_alias(alias)
        if alias == names.LATEST and not isinstance(target, int):
            raise InvalidField("alias 'latest' takes one version, no weights.", param="weights")
        answer = "unknown"
        if names.is_name(name):
            answer = await self._index.alias(tenant, name, alias, target, actor, condition, MAX_ALIASES)
        if answer == "too many":
            raise QuotaExceeded(f"Adapter {shown(name)} has {MAX_ALIASES} aliases, the most it may.")
        if answer == "changed":
            raise _changed(alias)
        if answer != "done":
            raise unknown(f"{name}@{await self._missing(tenant, name, target)}")

    async def unset(
        self, tenant: str, name: str, alias: str, *, actor: str = "server", condition: str = ""
    ) -> None:
        """Remove the alias; of `latest`, its pin. Raises ModelNotFound, PreconditionFailed."""
        answer = "unknown"
        if names.is_name(name) and names.is_name(alias):
            answer = await self._index.unalias(tenant, name, alias, actor, condition)
        if answer != "done":
            raise _changed(alias) if answer == "changed" else unknown(f"{name}@{alias}")

    async def rollback(
        self, tenant: str, name: str, alias: str, *, actor: str = "server", condition: str = ""
    ) -> None:
        """Point `alias` at its previous target; each further call goes back by one more.

        `latest` is pinned there. Raises Conflict when no earlier target has versions that still exist,
        PreconditionFailed, ModelNotFound.
        """
        answer = "unknown"
        if names.is_name(name) and names.is_name(alias):
            answer = await self._index.rollback(tenant, name, alias, actor, condition)
        if answer == "nothing":
            raise Conflict(f"alias {shown(alias)} has no earlier state to roll back to.", param="alias")
        if answer != "done":
            raise _changed(alias) if answer == "changed" else unknown(f"{name}@{alias}")

    async def _missing(self, tenant: str, name: str, target: AliasTarget) -> int:
        """The lowest version of `target` that does not exist."""
        adapters = await self._index.adapters(tenant, [name]) if names.is_name(name) else []
        existing = {version.version for adapter in adapters for version in adapter.versions}
        wanted = [target] if isinstance(target, int) else sorted(target)
        return next((version for version in wanted if version not in existing), wanted[0])


def _changed(alias: str) -> PreconditionFailed:
    return PreconditionFailed(f"alias {shown(alias)} is not as the request's condition says.", param="alias")


def unknown(model: str) -> ModelNotFound:
    """The error for a model that does not exist or is another tenant's: the two look alike."""
    return ModelNotFound(
        f"The model {shown(model)} does not exist or you do not have access to it.", param="model"
    )
