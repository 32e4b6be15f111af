"""JSON objects of adapters, their versions, aliases and history."""

from collections.abc import Iterable
from typing import Any

from adapters_store.alias_target import AliasTarget
from adapters_store.history import HistoryEntry
from adapters_store.index.records import Adapter, Alias, Deleted, Version
from server.adapters.formats.ignored_files import ignored


def version_object(version: Version) -> dict[str, Any]:
    """`adapter.version`: one version, as the index knows it."""
    return {
        "object": "adapter.version",
        "id": f"{version.name}@{version.version}",
        "version": version.version,
        "method": version.method,
        "rank": version.rank,
        "base": version.base,
        "bytes": version.bytes,
        "sha256": version.sha256,
        "digest": version.digest,
        "created": version.created,
    }


def uploaded_object(version: Version, dropped: Iterable[str] = ()) -> dict[str, Any]:
    """The answer to an upload. `dropped`: names of uploaded files that are not used."""
    return version_object(version) | {"object": "adapter", "name": version.name, "ignored": ignored(dropped)}


def adapter_object(adapter: Adapter) -> dict[str, Any]:
    """`adapter`: the latest version's fields, the aliases and all versions."""
    return version_object(adapter.latest) | {
        "object": "adapter",
        "id": adapter.name,
        "name": adapter.name,
        "aliases": {alias: _points(points) for alias, points in adapter.aliases.items()},
        "latest_pinned": adapter.pinned,
        "versions": [version_object(version) for version in adapter.versions],
    }


def alias_object(name: str, alias: str, target: Alias) -> dict[str, Any]:
    """Has `version` if it points at one version, else `weights`."""
    single = isinstance(target.points, int)
    return {
        "object": "adapter.alias",
        "id": f"{name}@{alias}",
        "adapter": name,
        "alias": alias,
        "version": target.points if single else None,
        "weights": None if single else _points(target.points),
    }


def deleted_object(deleted: Deleted, retention_seconds: float) -> dict[str, Any]:
    """`adapter.deleted`: the versions of a name that can be restored, and until when."""
    versions = [
        version_object(gone.version)
        | {
            "deleted_at": gone.deleted // 1000,
            "purged_after": int(gone.deleted / 1000 + retention_seconds),
        }
        for gone in deleted.versions
    ]
    return {"object": "adapter.deleted", "id": deleted.name, "name": deleted.name, "versions": versions}


def change_object(entry: HistoryEntry) -> dict[str, Any]:
    """`before` and `after` hold the aliases that the change moved; null where an alias did not exist."""
    return {
        "object": "adapter.change",
        "id": entry.id,
        "created": int(entry.time),
        "actor": entry.actor,
        "action": entry.action,
        "versions_added": entry.added,
        "versions_removed": entry.removed,
        "before": {alias: _points(points) for alias, points in entry.before.items()},
        "after": {alias: _points(points) for alias, points in entry.after.items()},
    }


def _points(points: AliasTarget | None) -> int | dict[str, float] | None:
    if isinstance(points, dict):
        return {str(version): weight for version, weight in points.items()}
    return points
