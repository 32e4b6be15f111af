"""What the index keeps, as its readers see it. No I/O."""

from typing import NamedTuple

import msgspec

from adapters_store.alias_target import AliasTarget, from_text, heaviest
from adapters_store.manifest import Manifest
from adapters_store.names import LATEST, manifest_key


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


class Alias(NamedTuple):
    points: AliasTarget
    etag: str  # changes with what it points at; "": not known, since the index was rebuilt


class Adapter(msgspec.Struct, frozen=True):
    tenant: str
    name: str
    versions: tuple[Version, ...]  # lowest first, at least one
    aliases: dict[str, AliasTarget]  # `latest` among them, which is always one version
    pinned: bool = False  # `latest` was set by hand
    etag: str = ""  # changes with anything here
    etags: dict[str, str] = {}  # of its aliases

    @property
    def latest(self) -> Version:
        number = heaviest(self.aliases[LATEST])
        return next(version for version in self.versions if version.version == number)

    def alias(self, name: str) -> Alias | None:
        return Alias(self.aliases[name], self.etags.get(name, "")) if name in self.aliases else None


class Gone(msgspec.Struct, frozen=True):
    """A deleted version, while it can be restored."""

    deleted: int  # Unix milliseconds
    version: Version


class Deleted(NamedTuple):
    name: str
    versions: tuple[Gone, ...]  # lowest first, at least one


class Standing(NamedTuple):
    """What decides whether one more version may come, and which."""

    last: int  # the highest version there ever was
    versions: int  # that the adapter has now; 0: there is no such adapter
    adapters: int  # that the tenant has
    bytes: int = 0  # of all versions that the tenant has, also deleted ones; 0 if not counted yet


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


def adapter_of(
    tenant: str,
    name: str,
    versions: dict[bytes, bytes],
    aliases: dict[bytes, bytes],
    state: dict[bytes, bytes],
) -> Adapter:
    """An adapter out of its three hashes, the first not empty."""
    found = [msgspec.json.decode(record, type=Version) for record in versions.values()]
    by_number = tuple(sorted(found, key=lambda version: version.version))
    named: dict[str, AliasTarget] = {LATEST: by_number[-1].version}
    named |= {alias.decode(): from_text(text.decode()) for alias, text in sorted(aliases.items())}
    tags = {field.decode(): value.decode() for field, value in state.items()}
    return Adapter(
        tenant,
        name,
        by_number,
        named,
        pinned="pin" in tags,
        etag=tags.get("revision", ""),
        etags={field[4:]: tag for field, tag in tags.items() if field.startswith("tag:")},
    )


def deleted_of(name: str, entries: dict[bytes, bytes]) -> Deleted:
    found = [msgspec.json.decode(entry, type=Gone) for entry in entries.values()]
    return Deleted(name, tuple(sorted(found, key=lambda gone: gone.version.version)))
