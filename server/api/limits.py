"""GET /v1/limits: every cap the server enforces, as data, so that a client need not find them by refusals."""

from fastapi import APIRouter, Depends, Response

from server.api import adapters, completions, grammar
from server.api.deps import Parts, current_tenant
from server.api.errors import json_response

router = APIRouter(dependencies=[Depends(current_tenant)])

FROM_SETTINGS = (
    "max_seqs",
    "max_queue",
    "max_n",
    "max_stop",
    "max_stop_chars",
    "max_top_logprobs",
    "max_logit_bias",
    "max_prompts",
    "max_body_bytes",
    "max_stack",
    "max_lora_rank",
    "max_upload_bytes",
    "max_upload_files",
    "max_tensors",
    "max_header_bytes",
    "max_adapters_per_tenant",
    "request_seconds",
)


@router.get("/v1/limits")
async def get_limits(parts: Parts) -> Response:
    return json_response(
        {"object": "limits", "model": parts.base.id, "max_context_tokens": parts.max_context}
        | {name: getattr(parts.settings, name) for name in FROM_SETTINGS}
        | {
            "default_max_tokens_completions": completions.DEFAULT_MAX_TOKENS,
            "default_max_tokens_chat": None,  # all that fits
            "max_schema_chars": grammar.MAX_CHARS,
            "page": adapters.PAGE,
        }
    )
