"""Publishes an adapter's files as a version: inspect, stage the blobs, let the engine run them, publish.

Every source goes through `prepare`: uploads, vLLM's load route, the bucket watcher and trained adapters.
Nothing is visible before the last step. A refused adapter leaves nothing; a crash leaves blobs that no
manifest names, which the collector removes.
"""

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from anyio.to_thread import run_sync

from adapters_store.index.records import Version, summary
from adapters_store.manifest import Blob, Manifest, content_digest, encode_manifest
from adapters_store.names import check_name
from server.adapters.formats import adapterhub as hub_interface
from server.adapters.formats.detect import MAX_BYTES, method_of, read_config
from server.adapters.formats.safetensors import read_header
from server.adapters.sites import Base
from server.adapters.specs.interface import AdapterFiles
from server.api.adapters.upload_form import CONFIG
from server.api.http.temp_files import temp_folder
from server.api.services import Services
from server.errors import (
    Conflict,
    InvalidAdapter,
    InvalidField,
    NotFound,
    PolypeftError,
    QuotaExceeded,
    error_from_code,
    shown,
)
from server.tenancy.tenants import Tenant


@dataclass(frozen=True)
class AdapterUpload:
    """The local files of an adapter; config and weights with the names under which they are stored."""

    config: tuple[str, Path]
    weights: tuple[str, Path]
    interface: Path | None = None  # AdapterHub's adapter_interface.json, if there is one


@dataclass(frozen=True)
class Inspected:
    """What config and safetensors header say."""

    method: str
    config: dict[str, Any]
    tensors: dict[str, tuple[str, list[int]]]  # dtype and shape by name
    rank: int

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for _dtype, shape in self.tensors.values())


async def publish(
    deps: Services,
    tenant: Tenant,
    name: str,
    files: AdapterUpload,
    *,
    create_only: bool = False,
    allow_noop: bool = False,
    actor: str = "server",
) -> Version:
    """The new version. Raises InvalidAdapter, InvalidField, Conflict, QuotaExceeded, Unavailable."""
    check_adapter_name(deps, name)
    size = files.config[1].stat().st_size + files.weights[1].stat().st_size
    version = await deps.registry.next_version(tenant.id, name, size)
    # in this order: an upload that publishes after this check takes the same number, and one gets a conflict
    if create_only and await _exists(deps, tenant, name):
        raise Conflict(f"An adapter named {shown(name)} exists.", param="name")
    manifest = await prepare(deps, tenant.id, name, version, files, allow_noop=allow_noop, actor=actor)
    try:
        try:
            await deps.registry.publish(manifest)
        except Conflict:
            if create_only:
                raise
            # another upload took the number, or crashed before the index knew of it, which it does now
            version = await deps.registry.next_version(tenant.id, name)
            manifest = msgspec.structs.replace(manifest, version=version)
            await deps.registry.publish(manifest)
    except (Conflict, QuotaExceeded):
        await _discard(deps, manifest.files)
        raise
    return summary(manifest)


async def prepare(
    deps: Services,
    tenant_id: str,
    name: str,
    version: int,
    files: AdapterUpload,
    *,
    allow_noop: bool = False,
    actor: str = "worker",
) -> Manifest:
    """The manifest to publish, after all checks: its blobs are staged, and the engine has loaded and run it.

    Raises InvalidAdapter, InvalidField, Unavailable.
    """
    base = deps.base
    inspected = await run_sync(inspect, files, deps, base)
    blobs = await deps.registry.stage(tenant_id, [files.config, files.weights])
    weights_sha256 = next(blob.sha256 for blob in blobs if blob.name == files.weights[0])
    manifest = Manifest(
        tenant=tenant_id,
        name=name,
        version=version,
        method=inspected.method,
        base=base.id,
        base_digest=base.digest,
        digest=content_digest(inspected.method, base.digest, inspected.config, weights_sha256),
        files=blobs,
        config=inspected.config,
        tensors=inspected.tensors,
        facts={"rank": inspected.rank, "parameters": inspected.parameters},
        created=int(time.time()),
        by=actor,
    )
    try:
        checked = await deps.engine.check(encode_manifest(manifest), allow_noop=allow_noop)
        if checked.error is not None:
            raise error_from_code(*checked.error)
    except PolypeftError:
        await _discard(deps, blobs)
        raise
    return msgspec.structs.replace(manifest, facts=checked.facts | manifest.facts)


async def _discard(deps: Services, blobs: list[Blob]) -> None:
    """Remove blobs that no version will name."""
    await deps.registry.collector.discard([blob.key for blob in blobs])


def check_adapter_name(deps: Services, name: str, param: str = "name") -> str:
    """`name`, if an adapter may have it. Raises InvalidField."""
    check_name(name, param)
    if name == deps.base.id:
        raise InvalidField(f"{param} {shown(name)} is the base model's own.", param=param)
    return name


def inspect(files: AdapterUpload, deps: Services, base: Base) -> Inspected:
    """Check all that can be checked without reading a tensor. Blocks. Raises InvalidAdapter."""
    config_path, weights_path = files.config[1], files.weights[1]
    with config_path.open("rb") as file:
        config = read_config(file.read(MAX_BYTES + 1))
    if files.interface:
        with files.interface.open("rb") as file:
            hub_interface.check_interface(file.read(hub_interface.MAX_INTERFACE_BYTES + 1), base.model_type)
    with weights_path.open("rb") as file:
        tensors = read_header(
            file,
            weights_path.stat().st_size,
            max_header_bytes=deps.settings.max_header_bytes,
            max_tensors=deps.settings.max_tensors,
        )
    method = deps.methods[method_of(config)]
    spec = method.parse(AdapterFiles(config, tensors), base)
    _check_shapes(method.shapes(spec, base), {name: info.shape for name, info in tensors.items()})
    described = {name: (info.dtype, list(info.shape)) for name, info in tensors.items()}
    return Inspected(method.name, config, described, spec.rank)


def _check_shapes(expected: dict[str, tuple[int, ...]], actual: dict[str, tuple[int, ...]]) -> None:
    """Raise InvalidAdapter unless the shapes are equal by name: otherwise wrong results would be served."""
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            raise InvalidAdapter(f"The tensor {shown(name)} is missing.", param=name)
        if name not in expected:
            raise InvalidAdapter(f"The tensor {shown(name)} fits nothing in this base.", param=name)
        if expected[name] != actual[name]:
            raise InvalidAdapter(
                f"The tensor {shown(name)} must have shape {list(expected[name])} for this base, not "
                f"{list(actual[name])}.",
                param=name,
            )


async def _exists(deps: Services, tenant: Tenant, name: str) -> bool:
    try:
        await deps.registry.get(tenant.id, name)
    except NotFound:
        return False
    return True


class TrainedAdmission:
    """`prepare` for the fine-tuning publisher, which has the folder of files that a training wrote."""

    def __init__(self, deps: Services) -> None:
        self._deps = deps

    @property
    def ready(self) -> bool:
        """Whether the engine can run an adapter now."""
        return self._deps.engine.ready and not self._deps.draining

    def folder(self) -> TemporaryDirectory[str]:
        return temp_folder(self._deps.settings)

    async def prepare(self, tenant: str, name: str, version: int, files: list[Path]) -> Manifest:
        """As `prepare`, whose errors it raises."""
        config = next(path for path in files if path.name == CONFIG)
        weights = next(path for path in files if path.suffix == ".safetensors")
        pair = AdapterUpload((CONFIG, config), (weights.name, weights))
        return await prepare(self._deps, tenant, name, version, pair)
