"""What a request's `model` means to this tenant: the base, or one version of an adapter of its own."""

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
TUNED = "ft:"  # before the base's id, as OpenAI calls fine-tuned models


@dataclass(frozen=True)
class Target:
    model: str  # as the caller wrote it; replies repeat it
    adapter: AdapterRef | None
    digest: str  # of the adapter or adapters, or of the base
    adapters: tuple[Use, ...] = ()  # several at once; `adapter` is None then
    layout: str = "float32"  # of the base's weights

    @property
    def fingerprint(self) -> str:
        """Changes whenever other weights answer."""
        layout = "" if self.layout == "float32" else f"_{self.layout}"
        return f"fp_{self.digest[:FINGERPRINT_CHARS]}{layout}"

    @property
    def headers(self) -> dict[str, str]:
        """Which versions answer: `model` may be an alias of several."""
        refs = [self.adapter, *(use.adapter for use in self.adapters)]
        used = [f"{ref.name}@{ref.version}" for ref in refs if ref is not None]
        return {"x-polypeft-adapter": ", ".join(used)} if used else {}


async def resolve(
    deps: Services,
    tenant: Tenant,
    model: str,
    several: list[AdapterUse] | None = None,
    sticky: str | None = None,
) -> Target:
    """The base's id, alone or with `several` adapters on it, or an adapter's name, name@version, name@alias,
    or ft:{base}:name:version. Of an alias with weights, `sticky` always gets the same version.

    Raises NotFound, the same for what does not exist and for what is another tenant's.
    """
    base = deps.base
    if model == base.id:
        if several:
            return await _stack(deps, tenant, several, sticky)
        return Target(model, None, base.digest, layout=base.layout)
    if several:
        raise InvalidField(
            f"With adapters, model must be the base {shown(base.id)}, not {shown(model)}.", param="model"
        )
    version = await find_version(deps, tenant, model, sticky=sticky)
    return Target(model, adapter_ref(version), version.digest, layout=base.layout)


async def _stack(deps: Services, tenant: Tenant, several: list[AdapterUse], sticky: str | None) -> Target:
    versions = [await find_version(deps, tenant, use.name, "adapters", sticky) for use in several]
    uses = tuple(
        Use(adapter_ref(version), use.weight) for version, use in zip(versions, several, strict=True)
    )
    content = ",".join(f"{use.adapter.digest}*{use.weight}" for use in uses)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Target(deps.base.id, None, digest, uses, deps.base.layout)


async def find_version(
    deps: Services, tenant: Tenant, model: str, param: str = "model", sticky: str | None = None
) -> Version:
    name, selector = split_model(deps, model)
    try:
        return await deps.registry.resolve(tenant.id, name, selector, sticky)
    except NotFound:
        raise unknown_model(model, param) from None


async def exact_version(deps: Services, tenant_id: str, name: str, selector: str) -> Version:
    """The one version that `selector` means. Raises InvalidField for an alias of several, NotFound."""
    if version_number(selector) is None:
        alias = await deps.registry.aliases.get(tenant_id, name, selector)
        if not isinstance(alias.points, int):
            raise InvalidField(
                f"alias {shown(selector)} stands for several versions; name one by its number.",
                param="version",
            )
    return await deps.registry.resolve(tenant_id, name, selector)


def split_model(deps: Services, model: str) -> tuple[str, str | None]:
    """Name, and version or alias if there is one, of name, name@version and ft:{base}:name:version."""
    tuned = f"{TUNED}{deps.base.id}:"
    name, at, selector = model.removeprefix(tuned).partition(":" if model.startswith(tuned) else "@")
    return name, selector if at else None


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
