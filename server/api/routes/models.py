"""/v1/models in OpenAI's shape: the base, and the tenant's adapters as models whose parent it is."""

from typing import Any

from fastapi import APIRouter, Depends, Response

from adapters_store.index.records import Version
from server.api.generation.model_selection import exact_version, find_version, split_model
from server.api.http.dependencies import Actor, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.routes.adapters.adapters import MAX_PAGE, delete
from server.api.schema.objects import Deleted, Model, ModelList
from server.api.services import Services
from server.errors import Forbidden

router = APIRouter(prefix="/v1/models", dependencies=[Depends(current_tenant)])


@router.get("", response_model=ModelList)
async def list_models(deps: Deps, tenant: CurrentTenant) -> Response:
    data = [_base_object(deps)]
    after: str | None = None
    while page := await deps.registry.list(tenant.id, after, MAX_PAGE):
        data += [_model_object(deps, adapter.name, adapter.latest) for adapter in page]
        after = page[-1].name
    return json_response({"object": "list", "data": data})


@router.get("/{model:path}", response_model=Model)
async def get_model(deps: Deps, tenant: CurrentTenant, model: str) -> Response:
    """The base, an adapter, or `name@version`, `name@alias` and `ft:{base}:name:version`."""
    if model == deps.base.id:
        return json_response(_base_object(deps))
    return json_response(_model_object(deps, model, await find_version(deps, tenant, model)))


@router.delete("/{model:path}", response_model=Deleted)
async def delete_model(deps: Deps, tenant: CurrentTenant, actor: Actor, model: str) -> Response:
    """An adapter with all its versions, or the one version that `name@...` or `ft:...` names."""
    if model == deps.base.id:
        raise Forbidden("The base model cannot be deleted.", param="model")
    version = await find_version(deps, tenant, model)
    _, selector = split_model(deps, model)
    if selector is not None:
        version = await exact_version(deps, tenant.id, version.name, selector)
    await delete(deps, tenant.id, version.name, None if selector is None else version.version, actor)
    return json_response({"id": model, "object": "model", "deleted": True})


def _base_object(deps: Services) -> dict[str, Any]:
    base = deps.base
    return {
        "id": base.id,
        "object": "model",
        "created": 0,
        "owned_by": "polypeft",
        "root": base.id,
        "parent": None,
        "max_model_len": deps.max_context,
    }


def _model_object(deps: Services, model: str, version: Version) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": version.created,
        "owned_by": version.tenant,
        "root": f"{version.name}@{version.version}",
        "parent": version.base,
        "max_model_len": deps.max_context,
    }
