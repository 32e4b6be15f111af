"""The values of metrics' labels, and what bounds the number of those that are not listed."""

from collections.abc import Mapping

# Labels whose values no table lists, and what bounds their number
OPEN: Mapping[str, str] = {
    "route": "the routes' templates, and `other`",
    "status": "the statuses this server answers with",
    "code": "the error codes of server/errors.py",
    "tenant": "the busiest `metrics_top` tenants' ids, and `other`",
    "adapter": "with `tenant`, the busiest `metrics_top` adapters, and `other`",
    "worker": "workers heard of within a minute, 64 at most",
    "model_name": "the base's id",
    "version": "one",
    "python": "one",
    "torch": "one",
    "max_lora": "the number of device slots",
    "running_lora_adapters": "one list",
    "waiting_lora_adapters": "one list",
}
OTHER = "other"

WAITS = ("capacity", "adapter", "sibling", "grammar")
PHASES = ("schedule", "forward", "adapter", "sample", "deliver")
TIERS = ("device", "ram", "disk")
SOURCES = ("ram", "disk", "store")
LOAD_FAILURES = ("missing", "invalid", "store")
GATE_REFUSALS = ("invalid", "non_finite", "no_effect", "too_large", "store", OTHER)
CLASSES = ("anonymous", "operator", "low", "standard", "high")
FINISHED = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "deadline", "draining", "engine_unavailable", "quota")
RATES = ("requests", "tokens", "concurrent", "queued", "size")
OPERATIONS = ("put", "create", "get", "download", "head", "delete", "list", "sign_put", OTHER)
PROCESSES = ("api", "engine", "worker")
OUTCOMES = ("finished", "saved", "crashed", "cancelled", "lost", "time", "disk", OTHER)


def operation_label(operation: str) -> str:
    """The label of a call of the object store."""
    return operation if operation in OPERATIONS else OTHER
