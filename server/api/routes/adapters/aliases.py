"""/v1/adapters/{name}/aliases: set, read, delete and roll back the aliases of an adapter.

A change takes If-Match, with the ETag of the alias or of its adapter.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import BeforeValidator, Field, model_validator

from adapters_store.alias_target import MAX_WEIGHTS, AliasTarget, check_weights
from adapters_store.index.records import Alias
from server.api.adapters.json_objects import adapter_object, alias_object
from server.api.generation.model_selection import adapter_ref
from server.api.http.body_model import Body, at_most_entries
from server.api.http.dependencies import Actor, CurrentChange, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.etags import Condition, MatchOnly, etag_header
from server.api.http.json_body import json_body
from server.api.services import Services
from server.errors import InvalidField

router = APIRouter(prefix="/v1/adapters", dependencies=[Depends(current_tenant)])


Weights = Annotated[dict[str, float], BeforeValidator(at_most_entries(MAX_WEIGHTS))]  # by "3" or "v3"


class AliasBody(Body):
    """An alias and its target: a version, or several with weights."""

    alias: str
    version: Annotated[int, Field(ge=1, le=99_999_999)] | None = None
    weights: Weights | None = None

    @model_validator(mode="after")
    def _version_or_weights(self) -> "AliasBody":
        if (self.version is None) == (self.weights is None):
            raise InvalidField(
                "alias needs either version or weights, and not both.",
                param="weights" if self.weights is not None else "version",
                code="invalid_value" if self.weights is not None else "missing_field",
            )
        return self

    @property
    def points(self) -> AliasTarget:
        """Raises InvalidField for weights that do not fit."""
        return self.version if self.version is not None else check_weights(self.weights or {})


@router.post("/{name}/aliases")
async def set_alias(
    deps: Deps,
    tenant: CurrentTenant,
    actor: Actor,
    change: CurrentChange,
    name: str,
    condition: Condition,
    body: Annotated[AliasBody, Depends(json_body(AliasBody))],
) -> Response:
    """Point a new or existing alias at a version, or at several by weight. `latest` is pinned to the version.

    With `If-None-Match: *` an alias that exists is a conflict.
    """
    change.of(name, body.alias, target=body.points)
    await deps.registry.aliases.set(
        tenant.id, name, body.alias, body.points, actor=actor, condition=condition
    )
    adapter = await deps.registry.get(tenant.id, name)
    await _prefetch(deps, tenant.id, name, adapter.alias(body.alias))
    return json_response(adapter_object(adapter), headers=etag_header(adapter.etag))


@router.get("/{name}/aliases/{alias}")
async def get_alias(deps: Deps, tenant: CurrentTenant, name: str, alias: str) -> Response:
    target = await deps.registry.aliases.get(tenant.id, name, alias)
    return json_response(alias_object(name, alias, target), headers=etag_header(target.etag))


@router.delete("/{name}/aliases/{alias}")
async def delete_alias(
    deps: Deps, tenant: CurrentTenant, actor: Actor, name: str, alias: str, condition: MatchOnly
) -> Response:
    """Deleting `latest` unpins it: it points at the newest promoted version again."""
    await deps.registry.aliases.unset(tenant.id, name, alias, actor=actor, condition=condition)
    return json_response({"id": f"{name}@{alias}", "object": "adapter.alias", "deleted": True})


@router.post("/{name}/aliases/{alias}/rollback")
async def roll_back(
    deps: Deps, tenant: CurrentTenant, actor: Actor, name: str, alias: str, condition: MatchOnly
) -> Response:
    """Point the alias at its previous target; each call goes back one change further."""
    await deps.registry.aliases.rollback(tenant.id, name, alias, actor=actor, condition=condition)
    target = await deps.registry.aliases.get(tenant.id, name, alias)
    await _prefetch(deps, tenant.id, name, target)
    return json_response(alias_object(name, alias, target), headers=etag_header(target.etag))


async def _prefetch(deps: Services, tenant_id: str, name: str, target: Alias | None) -> None:
    """Load the alias's versions, which requests will need next."""
    points = target.points if target else {}
    for number in [points] if isinstance(points, int) else points:
        version = await deps.registry.resolve(tenant_id, name, str(number))
        deps.engine.prefetch(adapter_ref(version))
