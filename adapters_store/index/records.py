"""Records of the index, as its readers see them. No I/O."""

from typing import NamedTuple

import msgspec

from adapters_store.alias_target import AliasTarget, from_text, heaviest
from adapters_store.manifest import Manifest
from adapters_store.names import LATEST, manifest_key


class Version(msgspec.Struct, frozen=True):
    """What the index holds of a manifest: enough to list a version and to request it of the engine."""

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
    evaluated: bool = False  # the manifest holds an evaluation


class Alias(NamedTuple):
    points: AliasTarget
    etag: str  # changes with the target; "": unknown, because the index was rebuilt


class Adapter(msgspec.Struct, frozen=True):
    tenant: str
    name: str
    versions: tuple[Version, ...]  # lowest first, at least one
    aliases: dict[str, AliasTarget]  # with `latest`, whose target is always one version
    pinned: bool = False  # `latest` was set by a caller
    etag: str = ""  # changes with any field
    etags: dict[str, str] = {}  # by alias

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


class Usage(NamedTuple):
    """What a new version's number, and whether it exceeds a limit, depend on."""

    last: int  # highest version number that was ever used
    versions: int  # of the adapter; 0: it does not exist
    adapters: int  # of the tenant
    bytes: int = 0  # of all the tenant's versions, deleted ones included; 0: not counted yet


def summary(manifest: Manifest) -> Version:
    """The index's record of `manifest`."""
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
    """An adapter from its three Valkey hashes. `versions` is not empty."""
    decoded = [msgspec.json.decode(record, type=Version) for record in versions.values()]
    by_number = tuple(sorted(decoded, key=lambda version: version.version))
    targets: dict[str, AliasTarget] = {LATEST: by_number[-1].version}
    targets |= {alias.decode(): from_text(text.decode()) for alias, text in sorted(aliases.items())}
    fields = {field.decode(): value.decode() for field, value in state.items()}
    return Adapter(
        tenant,
        name,
        by_number,
        targets,
        pinned="pin" in fields,
        etag=fields.get("revision", ""),
        etags={field.removeprefix("tag:"): tag for field, tag in fields.items() if field.startswith("tag:")},
    )


def deleted_of(name: str, entries: dict[bytes, bytes]) -> Deleted:
    """An adapter's deleted versions from their Valkey hash."""
    versions = [msgspec.json.decode(entry, type=Gone) for entry in entries.values()]
    return Deleted(name, tuple(sorted(versions, key=lambda gone: gone.version.version)))
