"""The OpenAPI document: FastAPI's own, with what it cannot see: bodies, keys, errors and headers.

A body is read by `json_body`, which carries its model: the document has the very model that validates. What a
route may answer follows from its method and its dependencies, and the errors' codes from server/errors.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server import __version__
from server.api.http.dependencies import KEY_HEADERS, current_tenant
from server.api.http.etags import condition, match_only
from server.api.http.rate_limits import rate_limited
from server.errors import PolypeftError, StartupError

Refs = dict[type[Any], Any]
REF = "#/components/schemas/{model}"
ALWAYS = (400, 408, 414, 431, 500, 503)
WITH_KEY = (401, 403, 404)
WRITES = (409, 412, 413, 415, 429, 504, 507)
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
SCHEMES = {"bearer": {"type": "http", "scheme": "bearer"}} | {
    name: {"type": "apiKey", "in": "header", "name": name} for name in KEY_HEADERS
}


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


REQUEST_ID = {"x-request-id": _header("The id of this request, also in the server's log.")}
STATUS_HEADERS: dict[int, dict[str, Any]] = {
    401: {"www-authenticate": _header("Bearer")},
    429: {
        "retry-after": _header("Seconds to wait; absent if waiting does not help.", "integer"),
        "retry-after-ms": _header("The same in milliseconds.", "integer"),
        "x-should-retry": _header("`false` if waiting does not help."),
    },
    503: {"retry-after": _header("Seconds to wait.", "integer")},
}
RATES = {
    f"x-ratelimit-{what}-{of}": _header(f"{said} {of}, if the tenant has such a limit.")
    for what, said in (("limit", "Most"), ("remaining", "What is left of"), ("reset", "When all is back of"))
    for of in ("requests", "tokens")
}
ADAPTER = {"x-polypeft-adapter": _header("The versions that answered, NAME@VERSION.")}
CONDITIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    condition: ("If-Match", "If-None-Match"),
    match_only: ("If-Match",),
}


def openapi(routers: Sequence[APIRouter]) -> dict[str, Any]:
    """The document of these routers' routes."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    document: dict[str, Any] = get_openapi(title="Polypeft", version=__version__, routes=routes)
    schemas, refs = _bodies(routes)
    parts = document.setdefault("components", {})
    parts["schemas"] = _without_fastapis(parts.get("schemas", {})) | schemas | {"Error": ERROR}
    parts["securitySchemes"] = SCHEMES
    parts["responses"] = {
        _error_name(status, limited): _error(status, limited)
        for status in sorted({*ALWAYS, *WITH_KEY, *WRITES})
        for limited in ((False, True) if status == 429 else (False,))
    }
    for route in routes:
        for method in route.methods or ():
            _complete(document["paths"][route.path_format][method.lower()], method, route, refs)
    return document


def _without_fastapis(schemas: dict[str, Any]) -> dict[str, Any]:
    """Without FastAPI's shapes of errors, which this server never gives."""
    return {name: value for name, value in schemas.items() if "ValidationError" not in name}


def _complete(
    operation: dict[str, Any], method: str, route: APIRoute, refs: dict[type[BaseModel], Any]
) -> None:
    """Add to FastAPI's description of one method of a route."""
    calls = list(_calls(route.dependant))
    keyed = current_tenant in calls
    limited = rate_limited in calls
    operation["security"] = [{name: []} for name in SCHEMES] if keyed else []
    if model := _body_model(calls):
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": refs[model]}},
        }
    operation.setdefault("parameters", []).extend(_conditions(calls))
    responses = operation["responses"]
    responses.pop("422", None)
    for response in responses.values():
        response.setdefault("description", "")
        response["headers"] = REQUEST_ID | response.get("headers", {}) | (RATES | ADAPTER if limited else {})
    said = {int(status) for status in responses if int(status) >= 400}
    statuses = {*said, *ALWAYS, *(WITH_KEY if keyed else ()), *(WRITES if method != "GET" else ())}
    for status in sorted(statuses):
        responses[str(status)] = {"$ref": f"#/components/responses/{_error_name(status, limited)}"}


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    """Every dependency of a route, at any depth."""
    for each in dependant.dependencies:
        if each.call is not None:
            yield each.call
        yield from _calls(each)


def _body_model(calls: Iterable[Callable[..., Any]]) -> type[BaseModel] | None:
    return next((call.model for call in calls if hasattr(call, "model")), None)


def _bodies(routes: list[APIRoute]) -> tuple[dict[str, Any], Refs]:
    """(schemas by name, a reference to each body's) of all routes."""
    models = {model: None for route in routes if (model := _body_model(_calls(route.dependant)))}
    refs, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    return definitions.get("$defs", {}), {model: ref for (model, _), ref in refs.items()}


def _conditions(calls: list[Callable[..., Any]]) -> list[dict[str, Any]]:
    names = [name for call, names in CONDITIONS.items() if call in calls for name in names]
    return [{"name": name, "in": "header", "required": False, "schema": {"type": "string"}} for name in names]


def _error_name(status: int, limited: bool) -> str:
    """`limited`: of a route that counts against the tenant's rates."""
    return f"{status}-rates" if limited and status == 429 else str(status)


def _error(status: int, limited: bool) -> dict[str, Any]:
    kinds = [kind for kind in _kinds(PolypeftError) if not issubclass(kind, StartupError)]
    codes = sorted({kind.code for kind in kinds if kind.status == status})
    return {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(codes)}",
        "headers": REQUEST_ID | STATUS_HEADERS.get(status, {}) | (RATES if limited and status == 429 else {}),
        "content": {"application/json": {"schema": {"$ref": REF.format(model="Error")}}},
    }


def _kinds(root: type[PolypeftError]) -> list[type[PolypeftError]]:
    return [root, *(kind for sub in root.__subclasses__() for kind in _kinds(sub))]
