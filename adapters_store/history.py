"""An adapter's history: how its versions and aliases changed. The scripts that make the changes write it.

It also has what the server did by itself, such as purges; the audit log (server/audit/) is about callers.
"""

from typing import Any

import msgspec

from adapters_store.alias_target import AliasTarget, from_text

MAX_ENTRIES = 200  # of one adapter; older ones are dropped
KEPT_SECONDS = 90 * 24 * 3600  # after the adapter's last version was purged


class HistoryEntry(msgspec.Struct, frozen=True):
    """One change. It moved each alias from `before` to `after`; None: the alias does not exist."""

    id: str
    time: float  # Unix seconds
    actor: str  # a key's id, "operator", "worker", "watch" or "server"
    action: str  # publish, alias, unalias, rollback, delete, purge, restore, index
    before: dict[str, AliasTarget | None]
    after: dict[str, AliasTarget | None]
    added: tuple[int, ...]  # version numbers
    removed: tuple[int, ...]


def decode_entry(record: bytes) -> HistoryEntry:
    """An entry from the JSON that the scripts write."""
    raw: dict[str, Any] = msgspec.json.decode(record)
    before = {alias: from_text(text) for alias, text in raw["before"].items()}
    after = {alias: from_text(text) for alias, text in raw["after"].items()}
    names = sorted({*before, *after})
    return HistoryEntry(
        id=raw["id"],
        time=raw["time"] / 1000,
        actor=raw["actor"],
        action=raw["action"],
        before={name: before.get(name) for name in names},
        after={name: after.get(name) for name in names},
        added=_numbers(raw["added"]),
        removed=_numbers(raw["removed"]),
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted(int(number) for number in text.split(",") if number))
