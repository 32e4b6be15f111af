"""A manifest: the immutable record of one adapter version. It is written last and makes the version exist."""

import hashlib
from typing import Any

import msgspec

SCHEMA = 1


class Blob(msgspec.Struct, frozen=True):
    """One uploaded file as stored. `key` is derived from the digest; `name` is only displayed."""

    name: str
    key: str
    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    tenant: str
    name: str
    version: int
    method: str
    base: str  # id of the base model that it was checked against
    base_digest: str
    digest: str  # content hash of method + config + weights; see content_digest
    files: list[Blob]
    config: dict[str, Any]  # the adapter's own config, parsed and allow-listed
    tensors: dict[str, tuple[str, list[int]]]  # name -> (safetensors dtype, shape)
    facts: dict[str, float | int | str] = {}  # parameters, rank ..., as the engine computed them
    created: int  # Unix seconds
    promoted: bool = True  # False: `latest` stays where it is
    evaluation: dict[str, Any] | None = None  # of a version trained here: metrics of base and adapter
    by: str = ""  # its publisher: a key's id, "operator", "worker" or "watch"
    schema: int = SCHEMA

    @property
    def weights(self) -> Blob:
        return next(f for f in self.files if f.name.endswith(".safetensors"))


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)


def decode_manifest(data: bytes) -> Manifest:
    return msgspec.json.decode(data, type=Manifest)


def content_digest(method: str, base_digest: str, config: dict[str, Any], weights_sha256: str) -> str:
    """The adapter's identity, a SHA-256: equal for the same weights under another name."""
    content = msgspec.json.encode([method, base_digest, config, weights_sha256], order="sorted")
    return hashlib.sha256(content).hexdigest()
