"""Resolves a request's `model` for a tenant: the base, or one version of an adapter of the tenant's own."""

import hashlib
from dataclasses import dataclass

from adapters_store.index.records import Version
from adapters_store.names import version_number
from server.api.generation.bodies import AdapterUse
from server.api.services import Services
from server.errors import InvalidField, ModelNotFound, NotFound, shown
from server.messages import AdapterRef, Use
from server.tenancy.tenants import Tenant

FINGERPRINT_CHARS = 16
FINE_TUNED_PREFIX = "ft:"  # before the base's id, as OpenAI names fine-tuned models


@dataclass(frozen=True)
class Target:
    """The weights that answer a request."""

    model: str  # as in the request; the answer repeats it
    adapter: AdapterRef | None
    digest: str  # of the adapter or adapters; of the base if there is none
    adapters: tuple[Use, ...] = ()  # several combined; then `adapter` is None
    layout: str = "float32"  # weight format of the base

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: differs for other weights."""
        layout = "" if self.layout == "float32" else f"_{self.layout}"
        return f"fp_{self.digest[:FINGERPRINT_CHARS]}{layout}"

    @property
    def names(self) -> list[str]:
        """The adapters that answer, each once."""
        return list({ref.name: None for ref in self._refs})

    @property
    def _refs(self) -> list[AdapterRef]:
        return [use.adapter for use in self.adapters] if self.adapter is None else [self.adapter]

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that name the versions which answer: `model` may be an alias of several."""
        used = [f"{ref.name}@{ref.version}" for ref in self._refs]
        return {"x-polypeft-adapter": ", ".join(used)} if used else {}


async def resolve(
    deps: Services,
    tenant: Tenant,
    model: str,
    uses: list[AdapterUse] | None = None,
    sticky: str | None = None,
) -> Target:
    """`model` is the base's id, alone or combined with adapters `uses`; or an adapter as name, name@version,
    name@alias or ft:{base}:name:version. An alias with weights gives the same version for the same `sticky`.

    Raises InvalidField, and ModelNotFound alike for unknown models and for those of other tenants.
    """
    base = deps.base
    if model == base.id:
        if uses:
            return await _combine(deps, tenant, uses, sticky)
        return Target(model, None, base.digest, layout=base.weight_format)
    if uses:
        raise InvalidField(
            f"With adapters, model must be the base {shown(base.id)}, not {shown(model)}.", param="model"
        )
    version = await find_version(deps, tenant, model, sticky=sticky)
    return Target(model, adapter_ref(version), version.digest, layout=base.weight_format)


async def _combine(deps: Services, tenant: Tenant, uses: list[AdapterUse], sticky: str | None) -> Target:
    """The base with several weighted adapters."""
    versions = [await find_version(deps, tenant, use.name, "adapters", sticky) for use in uses]
    adapters = tuple(
        Use(adapter_ref(version), use.weight) for version, use in zip(versions, uses, strict=True)
    )
    content = ",".join(f"{use.adapter.digest}*{use.weight}" for use in adapters)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Target(deps.base.id, None, digest, adapters, deps.base.weight_format)


async def find_version(
    deps: Services, tenant: Tenant, model: str, param: str = "model", sticky: str | None = None
) -> Version:
    """The version that `model` names. Raises ModelNotFound."""
    name, selector = split_model(deps, model)
    try:
        return await deps.registry.resolve(tenant.id, name, selector, sticky)
    except NotFound:
        raise unknown_model(model, param) from None


async def exact_version(deps: Services, tenant_id: str, name: str, selector: str) -> Version:
    """The only version that `selector` names. Raises NotFound, and InvalidField for an alias of several."""
    if version_number(selector) is None:
        alias = await deps.registry.aliases.get(tenant_id, name, selector)
        if not isinstance(alias.points, int):
            raise InvalidField(
                f"alias {shown(selector)} stands for several versions; name one by its number.",
                param="version",
            )
    return await deps.registry.resolve(tenant_id, name, selector)


def split_model(deps: Services, model: str) -> tuple[str, str | None]:
    """(name, version or alias or None) of name, name@version, name@alias and ft:{base}:name:version."""
    prefix = f"{FINE_TUNED_PREFIX}{deps.base.id}:"
    name, separator, selector = model.removeprefix(prefix).partition(":" if model.startswith(prefix) else "@")
    return name, selector if separator else None


def unknown_model(model: str, param: str = "model") -> ModelNotFound:
    return ModelNotFound(f"The model `{shown(model)[1:-1]}` does not exist.", param=param)


def adapter_ref(version: Version) -> AdapterRef:
    return AdapterRef(
        tenant=version.tenant,
        name=version.name,
        version=version.version,
        digest=version.digest,
        method=version.method,
        manifest_key=version.manifest_key,
    )
