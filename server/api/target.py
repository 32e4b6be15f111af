"""What a request's `model` means to this tenant: the base, or one version of an adapter of its own."""

from dataclasses import dataclass

from adapters_store.index import Version
from server.api.services import Services
from server.engine.messages import AdapterRef
from server.errors import NotFound, shown
from server.tenancy.tenants import Tenant

FINGERPRINT_CHARS = 16


@dataclass(frozen=True)
class Target:
    model: str  # as the caller wrote it; replies repeat it
    adapter: AdapterRef | None
    digest: str  # of the adapter, or of the base

    @property
    def fingerprint(self) -> str:
        """Changes whenever other weights answer."""
        return f"fp_{self.digest[:FINGERPRINT_CHARS]}"


async def resolve(parts: Services, tenant: Tenant, model: str) -> Target:
    """The base's id, or an adapter's name, name@version or name@alias.

    Raises NotFound, the same for what does not exist and for what is another tenant's.
    """
    base = parts.base
    if model == base.id:
        return Target(model, None, base.digest)
    version = await find_version(parts, tenant, model)
    return Target(model, adapter_ref(version), version.digest)


async def find_version(parts: Services, tenant: Tenant, model: str) -> Version:
    name, at, selector = model.partition("@")
    try:
        return await parts.registry.resolve(tenant.id, name, selector if at else None)
    except NotFound:
        raise unknown_model(model) from None


def unknown_model(model: str) -> NotFound:
    return NotFound(
        f"The model `{shown(model)[1:-1]}` does not exist.", param="model", code="model_not_found"
    )


def adapter_ref(version: Version) -> AdapterRef:
    return AdapterRef(
        tenant=version.tenant,
        name=version.name,
        version=version.version,
        digest=version.digest,
        method=version.method,
        manifest_key=version.manifest_key,
    )
