"""GET /v1/limits: every cap that the server enforces, as data, for the tenant that asks. It enforces none."""

from fastapi import APIRouter, Depends, Response

from adapters_store.upload_records import LIFE_SECONDS
from server.api.generation.engine_requests import MAX_PROMPT_LOGPROBS, max_context
from server.api.http import connection
from server.api.http.body_model import MAX_METADATA
from server.api.http.dependencies import CurrentCaller, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.request_limits import max_body_bytes, max_prompt_chars
from server.api.routes import completions, uploads
from server.api.routes.adapters import adapters
from server.api.structured_output import compilation
from server.api.tools import bodies, tool_use
from server.finetune.jobs.jobs import IDEMPOTENCY_SECONDS
from server.tenancy.limits import tightest
from server.tenancy.tenant_keys import MAX_KEYS

router = APIRouter(dependencies=[Depends(current_tenant)])

RATES = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
OF_TENANT = {  # fields of Limits, by their names here
    "queued_tokens": "queued_tokens",
    "max_adapters_per_tenant": "adapters",
    "max_adapter_bytes_per_tenant": "adapter_bytes",
    "max_files_bytes_per_tenant": "file_bytes",
    "max_jobs_per_tenant": "jobs",
    "training_tokens_per_day": "training_tokens_per_day",
    "priority": "priority",
}
FROM_SETTINGS = (
    "max_seqs",
    "max_queue",
    "max_stop",
    "max_stop_chars",
    "max_top_logprobs",
    "max_logit_bias",
    "max_prompts",
    "max_messages",
    "max_connections",
    "max_stack",
    "max_lora_rank",
    "max_upload_bytes",
    "max_upload_files",
    "max_tensors",
    "max_header_bytes",
    "retention_seconds",
    "keep_versions",
    "max_pins_per_tenant",
    "max_file_bytes",
    "max_files_per_tenant",
    "max_uploads_per_tenant",
    "max_training_examples",
    "max_training_tokens",
    "max_training_context",
    "max_training_steps",
    "max_training_seconds",
    "max_training_disk_bytes",
    "request_seconds",
)


@router.get("/v1/limits")
async def get_limits(deps: Deps, caller: CurrentCaller) -> Response:
    """The tenant's and the key's, the caps of Settings, those that follow from the base, and constants."""
    limits, allowances = caller.limits, caller.allowances
    max_n = tightest(allowances, "max_n") or deps.settings.max_n
    return json_response(
        {"object": "limits", "model": deps.base.id, "max_context_tokens": max_context(deps, allowances)}
        | {name: tightest(allowances, name) for name in RATES}
        | {"max_n": min(max_n, deps.settings.max_n)}
        | {name: getattr(limits, field) for name, field in OF_TENANT.items()}
        | {name: getattr(deps.settings, name) for name in FROM_SETTINGS}
        | {
            "max_rows_per_tenant": deps.max_rows // 2,  # running and waiting, while no other tenant has any
            "default_max_tokens_completions": completions.DEFAULT_MAX_TOKENS,
            "default_max_tokens_chat": None,  # all that fits
            "max_body_bytes": max_body_bytes(deps),
            "max_prompt_chars": max_prompt_chars(deps),
            "max_head_bytes": connection.MAX_HEAD_BYTES,
            "max_head_fields": connection.MAX_HEADERS,
            "max_url_bytes": connection.MAX_URL_BYTES,
            "head_seconds": connection.HEAD_SECONDS,
            "send_seconds": connection.SEND_SECONDS,
            "max_metadata": MAX_METADATA,
            "max_prompt_logprobs": MAX_PROMPT_LOGPROBS,
            "max_schema_chars": compilation.MAX_SCHEMA_CHARS,
            "max_tools": bodies.MAX_TOOLS,
            "max_tools_chars": tool_use.MAX_TOOLS_CHARS,
            "page": adapters.MAX_PAGE,
            "max_part_bytes": uploads.MAX_PART_BYTES,
            "upload_seconds": LIFE_SECONDS,
            "adapter_upload_seconds": LIFE_SECONDS,
            "max_keys_per_tenant": MAX_KEYS,
            "idempotency_seconds": IDEMPOTENCY_SECONDS,
        }
    )
