"""What each route takes of a key, and what the audit log calls the change that it makes. The one such table.

`scopes`: any one of them opens the route; FULL means all of them. `action`: "" for a route that changes
nothing that the audit log has. A route that is missing here takes a full key and is in the audit log
(tests/server/api/keys/test_access.py finds it). OPERATORS_ROUTES refuse tenants' keys whatever their scopes.
"""

from typing import NamedTuple

from server.errors import Forbidden
from server.tenancy.key_terms import ALL_SCOPES, KeyInfo


class Access(NamedTuple):
    scopes: frozenset[str]  # none: it takes all there are
    action: str = ""


FULL: frozenset[str] = frozenset()
ANY = frozenset(ALL_SCOPES)
READ = frozenset({"read"})
INFERENCE = frozenset({"inference"})
ADAPTERS = frozenset({"adapters"})
FINE_TUNE = frozenset({"fine-tune"})

OPERATORS_ROUTES = ("/admin/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
ROUTES: dict[str, Access] = {
    "POST /v1/completions": Access(INFERENCE),
    "POST /v1/chat/completions": Access(INFERENCE),
    "POST /tokenize": Access(INFERENCE),
    "POST /detokenize": Access(INFERENCE),
    "GET /tokenizer_info": Access(ANY),
    "GET /v1/models": Access(ANY),
    "GET /v1/models/{model:path}": Access(ANY),
    "DELETE /v1/models/{model:path}": Access(ADAPTERS, "adapter.delete"),
    "GET /v1/limits": Access(ANY),
    # adapters
    "POST /v1/adapters": Access(ADAPTERS, "adapter.upload"),
    "GET /v1/adapters": Access(READ | ADAPTERS),
    "GET /v1/adapters/{name}": Access(READ | ADAPTERS),
    "DELETE /v1/adapters/{name}": Access(ADAPTERS, "adapter.delete"),
    "POST /v1/adapters/{name}/restore": Access(ADAPTERS, "adapter.restore"),
    "GET /v1/adapters/{name}/history": Access(READ | ADAPTERS),
    "GET /v1/adapters/{name}/versions/{version}": Access(READ | ADAPTERS),
    "DELETE /v1/adapters/{name}/versions/{version}": Access(ADAPTERS, "adapter.delete"),
    "GET /v1/adapters/{name}/versions/{version}/download": Access(READ | ADAPTERS),
    "POST /v1/adapter_uploads": Access(ADAPTERS, "adapter_upload.create"),
    "GET /v1/adapter_uploads/{upload_id}": Access(ADAPTERS),  # it signs URLs that take bytes
    "POST /v1/adapter_uploads/{upload_id}/cancel": Access(ADAPTERS, "adapter_upload.cancel"),
    "POST /v1/adapter_uploads/{upload_id}/complete": Access(ADAPTERS, "adapter.upload"),
    "POST /v1/adapters/{name}/aliases": Access(ADAPTERS, "alias.set"),
    "GET /v1/adapters/{name}/aliases/{alias}": Access(READ | ADAPTERS),
    "DELETE /v1/adapters/{name}/aliases/{alias}": Access(ADAPTERS, "alias.delete"),
    "POST /v1/adapters/{name}/aliases/{alias}/rollback": Access(ADAPTERS, "alias.rollback"),
    "POST /v1/adapters/{name}/pin": Access(ADAPTERS, "pin.set"),
    "GET /v1/adapters/{name}/pin": Access(READ | ADAPTERS),
    "DELETE /v1/adapters/{name}/pin": Access(ADAPTERS, "pin.delete"),
    # files and jobs
    "POST /v1/files": Access(FINE_TUNE, "file.upload"),
    "GET /v1/files": Access(READ | FINE_TUNE),
    "GET /v1/files/{file_id}": Access(READ | FINE_TUNE),
    "DELETE /v1/files/{file_id}": Access(FINE_TUNE, "file.delete"),
    "GET /v1/files/{file_id}/content": Access(READ | FINE_TUNE),
    "POST /v1/uploads": Access(FINE_TUNE, "upload.create"),
    "POST /v1/uploads/{upload_id}/parts": Access(FINE_TUNE),  # its completion is in the log
    "POST /v1/uploads/{upload_id}/complete": Access(FINE_TUNE, "upload.complete"),
    "POST /v1/uploads/{upload_id}/cancel": Access(FINE_TUNE, "upload.cancel"),
    "POST /v1/fine_tuning/jobs": Access(FINE_TUNE, "job.create"),
    "GET /v1/fine_tuning/jobs": Access(READ | FINE_TUNE),
    "GET /v1/fine_tuning/jobs/{job_id}": Access(READ | FINE_TUNE),
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": Access(FINE_TUNE, "job.cancel"),
    "POST /v1/fine_tuning/jobs/{job_id}/pause": Access(FINE_TUNE, "job.pause"),
    "POST /v1/fine_tuning/jobs/{job_id}/resume": Access(FINE_TUNE, "job.resume"),
    "GET /v1/fine_tuning/jobs/{job_id}/events": Access(READ | FINE_TUNE),
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": Access(READ | FINE_TUNE),
    # the tenant's usage, keys and audit log
    "GET /v1/usage": Access(READ),
    "POST /v1/keys": Access(FULL, "key.create"),
    "GET /v1/keys": Access(READ),
    "POST /v1/keys/{key_id}/rotate": Access(FULL, "key.rotate"),
    "DELETE /v1/keys/{key_id}": Access(FULL, "key.revoke"),
    "GET /v1/keys/{key_id}/limits": Access(READ),
    "PUT /v1/keys/{key_id}/limits": Access(FULL, "limits.set"),
    "GET /v1/adapters/{name}/limits": Access(READ | ADAPTERS),
    "PUT /v1/adapters/{name}/limits": Access(ADAPTERS, "limits.set"),
    "GET /v1/audit": Access(READ),
    # the operator's
    "POST /v1/load_lora_adapter": Access(ADAPTERS, "adapter.upload"),
    "POST /v1/unload_lora_adapter": Access(ADAPTERS, "adapter.delete"),
    "POST /admin/tenants": Access(FULL, "tenant.create"),
    "GET /admin/tenants": Access(READ),
    "GET /admin/tenants/{tenant_id}": Access(READ),
    "GET /admin/tenants/{tenant_id}/limits": Access(READ),
    "PUT /admin/tenants/{tenant_id}/limits": Access(FULL, "limits.set"),
    "GET /admin/tenants/{tenant_id}/keys/{key_id}/limits": Access(READ),
    "PUT /admin/tenants/{tenant_id}/keys/{key_id}/limits": Access(FULL, "limits.set"),
    "GET /admin/tenants/{tenant_id}/adapters/{adapter}/limits": Access(READ),
    "PUT /admin/tenants/{tenant_id}/adapters/{adapter}/limits": Access(FULL, "limits.set"),
    "POST /admin/tenants/{tenant_id}/keys": Access(FULL, "key.create"),
    "GET /admin/tenants/{tenant_id}/keys": Access(READ),
    "POST /admin/tenants/{tenant_id}/keys/{key_id}/rotate": Access(FULL, "key.rotate"),
    "DELETE /admin/tenants/{tenant_id}/keys/{key_id}": Access(FULL, "key.revoke"),
    "POST /admin/tenants/{tenant_id}/adapters": Access(ADAPTERS, "adapter.upload"),
    "POST /admin/rebuild-index": Access(FULL, "store.rebuild_index"),
    "POST /admin/gc": Access(FULL, "store.gc"),
    "POST /admin/verify": Access(FULL, "store.verify"),
    "GET /admin/audit": Access(READ),
    "GET /admin/usage": Access(READ),
}


def access_to(method: str, path: str) -> Access:
    """Of the route with this template for a path."""
    route = f"{method} {path}"
    return ROUTES.get(route) or Access(FULL, "" if method == "GET" else route)


def check_scopes(key: KeyInfo, access: Access) -> None:
    """Raise Forbidden for a key whose scopes do not open the route."""
    if key.is_full or access.scopes & set(key.scopes):
        return
    if access.scopes:
        what = "the scope " + " or ".join(scope for scope in ALL_SCOPES if scope in access.scopes)
    else:
        what = f"all scopes ({', '.join(ALL_SCOPES)})"
    raise Forbidden(
        f"This route takes a key with {what}; this key has {', '.join(key.scopes)}.",
        code="insufficient_permissions",
    )
