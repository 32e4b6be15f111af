"""Every setting, once. The only file that reads the environment (POLYPEFT_*).

The command line builds a Settings; child processes rebuild the same one from `to_env()`.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.origins import read_origins

MiB = 1 << 20
# for processes that find the model on this disk; progress bars would break the log's lines
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# How often libgomp looks before a thread that waits for another sleeps: for some forty microseconds. By
# default it spins for milliseconds, on the very core that the other may need: beside one busy process, a step
# of 35 ms took more than a second; so it takes 90. On an idle machine it costs nothing.
SPINS = {"GOMP_SPINCOUNT": "3000"}
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
MAX_LIMIT, MAX_BYTES_LIMIT = 10**9, 1 << 50  # of tenants' limits; the latter on bytes
LONGEST_RUN_DIR = 90  # bytes; leaves room for a socket's own name


class Settings(BaseSettings):
    """Each field is an option of `polypeft serve`, its docstring the help, and a variable POLYPEFT_<NAME>."""

    model_config = SettingsConfigDict(
        env_prefix="POLYPEFT_", frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    # what is served, and where
    model: str = Field(default="smollm2-135m-instruct", min_length=1)
    """The base: the default model, a local folder, or a hub id owner/name[@revision]."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0: any free one."""
    allowed_origins: str | None = None
    """Web pages that may call: origins like https://app.example, with commas between, or *; else none."""
    docs: bool = True
    """Serve /openapi.json and /docs, without a key."""
    api_processes: int = Field(default=1, ge=1, le=64)
    """Processes that speak HTTP, all on that port and to the one engine."""
    data_dir: Path = Path("data")
    """Where everything lies that must survive."""
    admin_key_file: Path | None = None
    """File with the operator's key, which servers may share; without it, admin.key in the data directory."""
    trusted_proxies: str | None = None
    """Networks (CIDRs, joined by commas) of proxies whose X-Forwarded-For is believed; without it, none."""
    audit_days: int = Field(default=90, ge=1, le=3650)
    """Days that the audit log keeps an entry."""
    audit_entries: int = Field(default=10_000, ge=100, le=10_000_000)
    """Entries of the audit log that a tenant may have; the oldest are dropped."""
    store: str | None = None
    """URL of the object store for adapters; without it, a folder in the data directory."""
    store_config: Path | None = None
    """File with the store's endpoint, region and keys, JSON or INI; without it, the cloud's own variables."""
    redis_url: str | None = None
    """URL of a Valkey or Redis; without it, a Valkey of our own in the data directory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and KV cache; auto: float32 on a CPU, bfloat16 on CUDA."""
    quantize: Literal["none", "int8"] = "none"
    """Of the base's linears on a CPU; int8: a quarter of the bytes, over twice as fast, nearly the same."""
    lora_dtype: Literal["auto", "bfloat16"] = "auto"
    """Of LoRA's matrices beside float32 weights on a CPU; auto: as saved; bfloat16: in half the bytes."""
    threads: int = Field(default=0, ge=0)
    """The engine's threads; 0: all cores this process may use."""

    # the engine
    max_seqs: int = Field(default=32, ge=1, le=1024)
    """Rows in a batch."""
    max_model_len: int = Field(default=0, ge=0)
    """Tokens of prompt and answer together; 0: the base's own context."""
    max_batch_tokens: int = Field(default=0, ge=0)
    """Tokens in a step, prompts beside decode; 0: 256 on a CPU, 2048 on CUDA."""
    kv_bytes: int = Field(default=1024 * MiB, ge=MiB)
    """Memory for keys and values of the running rows and the prefix cache."""
    lookup_tokens: int = Field(default=7, ge=0, le=7)
    """Tokens a row may guess ahead out of its own text, on a CPU: the same answers, sooner; 0: none."""
    tool_format: Literal["auto", "hermes", "llama3", "mistral", "mistral-args", "json"] = "auto"
    """How the model writes function calls; auto: as its chat template does."""
    prefix_cache: bool = True
    """Reuse the keys and values of a prompt's beginning, within one tenant and adapter."""

    # the adapter cache, tier by tier
    adapter_slots: int = Field(default=64, ge=1, le=4096)
    """Adapters on the device at once."""
    adapter_device_bytes: int = Field(default=2048 * MiB, ge=MiB)
    """Device memory for adapters."""
    adapter_ram_bytes: int = Field(default=2048 * MiB, ge=MiB)
    """Host memory for adapters that are not on the device."""
    adapter_disk_bytes: int = Field(default=16384 * MiB, ge=MiB)
    """Local disk for adapters out of the object store."""

    # versions that are deleted, and what nobody needs any more
    retention_seconds: float = Field(default=7 * 86_400.0, ge=0)
    """How long what is deleted can be restored."""
    keep_versions: int = Field(default=0, ge=0)
    """Versions an adapter keeps beside those that an alias points at; older ones are deleted. 0: all."""
    grace_seconds: float = Field(default=86_400.0, ge=3600)
    """How long an upload may take before its blobs are garbage."""
    usage_days: int = Field(default=400, ge=1, le=4000)
    """Days for which the sums of usage are kept."""
    watch_prefix: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9_-]+)*$")
    """Where in the store to look for adapters to publish, PREFIX/TENANT/NAME/; without it, nowhere."""
    watch_seconds: float = Field(default=10.0, gt=0)
    """Time between two looks there."""

    workers: int = Field(default=1, ge=0, le=64)
    """Processes for fine-tuning that `serve` starts; 0: none but `polypeft worker` elsewhere."""

    # what a caller may ask for; GET /v1/limits shows all of it
    max_queue: int = Field(default=256, ge=1)
    """Rows waiting, all tenants together."""
    max_n: int = Field(default=8, ge=1)
    """Choices a request may ask for."""
    max_stop: int = Field(default=64, ge=1)
    """Stop strings of a request."""
    max_stop_chars: int = Field(default=256, ge=1)
    """Characters of a stop string."""
    max_top_logprobs: int = Field(default=20, ge=0)
    """Alternatives shown for each token."""
    max_logit_bias: int = Field(default=300, ge=0)
    """Entries of logit_bias."""
    max_prompts: int = Field(default=16, ge=1)
    """Prompts of a completion request."""
    max_body_bytes: int = Field(default=4 * MiB, ge=1024)
    """Bytes of a JSON body; fewer, if the context cannot need as many: `GET /v1/limits` shows it."""
    max_messages: int = Field(default=2048, ge=1)
    """Messages of a conversation, and parts of their contents."""
    max_connections: int = Field(default=1000, ge=1)
    """Connections to an API process at a time; the longest idle one makes way for a new one."""
    max_stack: int = Field(default=4, ge=1)
    """Adapters in one request."""
    max_lora_rank: int = Field(default=256, ge=1, le=1024)
    """The highest LoRA rank taken."""
    max_upload_bytes: int = Field(default=1024 * MiB, ge=1024)
    """Bytes of an adapter upload."""
    max_upload_files: int = Field(default=32, ge=1)
    """Files of an adapter upload."""
    max_tensors: int = Field(default=20_000, ge=1)
    """Tensors of an adapter."""
    max_header_bytes: int = Field(default=8 * MiB, ge=1024)
    """Bytes of a safetensors header."""
    max_adapters_per_tenant: int = Field(default=10_000, ge=1)
    """Adapters a tenant may keep, unless it has a limit of its own."""
    max_adapter_bytes_per_tenant: int = Field(default=65536 * MiB, ge=1024)
    """Bytes of all its versions, likewise; deleted ones count until they are purged."""
    max_pins_per_tenant: int = Field(default=4, ge=0)
    """Adapters a tenant may pin to the device."""
    max_file_bytes: int = Field(default=64 * MiB, ge=1024)
    """Bytes of a training file."""
    max_files_per_tenant: int = Field(default=1000, ge=1)
    """Files a tenant may keep."""
    max_files_bytes_per_tenant: int = Field(default=4096 * MiB, ge=1024)
    """Bytes of all files a tenant may keep, unless it has a limit of its own."""
    max_uploads_per_tenant: int = Field(default=8, ge=1)
    """Chunked uploads a tenant may have open."""
    max_jobs_per_tenant: int = Field(default=8, ge=1)
    """Unfinished fine-tuning jobs a tenant may have, unless it has a limit of its own."""
    requests_per_minute: int | None = Field(default=None, ge=1, le=MAX_LIMIT)
    """Generation requests a minute of a tenant that has no limit of its own; without it, no limit."""
    tokens_per_minute: int | None = Field(default=None, ge=1, le=MAX_LIMIT)
    """Tokens a minute, prompts and answers, of such a tenant; without it, no limit."""
    concurrent_requests: int | None = Field(default=None, ge=1, le=MAX_LIMIT)
    """Generation requests of such a tenant at once; without it, no limit."""
    queued_tokens: int | None = Field(default=None, ge=1, le=MAX_LIMIT)
    """Tokens of such a tenant's requests that wait for their first; without it, no limit."""
    training_tokens_per_day: int | None = Field(default=None, ge=0, le=MAX_LIMIT)
    """Tokens a day that such a tenant's jobs may train on; without it, no limit."""
    outage_seconds: float = Field(default=60.0, ge=0, le=3600)
    """How long keys and adapters that were used lately are served while Valkey is away; 0: not at all."""
    max_training_examples: int = Field(default=100_000, ge=1)
    """Examples of a training file."""
    max_training_tokens: int = Field(default=20_000_000, ge=1)
    """Tokens of a training file."""
    max_training_context: int = Field(default=4096, ge=2)
    """Tokens of one training example; longer ones are truncated."""
    max_training_steps: int = Field(default=100_000, ge=1)
    """Updates of a fine-tuning job."""
    max_training_seconds: int = Field(default=6 * 3600, ge=1)
    """Time a fine-tuning job may train."""
    max_training_disk_bytes: int = Field(default=4096 * MiB, ge=MiB)
    """Local disk that one fine-tuning job may fill while it runs."""
    request_seconds: float = Field(default=600.0, gt=0)
    """The longest a request may take."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long running requests may go on after SIGTERM."""
    lora_folder: Path | None = None
    """Where /v1/load_lora_adapter may read; without it, the route is off."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least a record must be to be logged."""
    log_format: Literal["text", "json"] = "text"
    """How a record is written."""
    metrics_adapter_labels: Literal["off", "ids", "names"] = "off"
    """How /metrics calls the busiest tenants' adapters; unless off, it takes a key to read it."""
    metrics_top: int = Field(default=20, ge=0, le=200)
    """Tenants, and adapters, with figures of their own in /metrics; the rest count as `other`."""
    metrics_token: str | None = Field(default=None, min_length=16)
    """Bearer token for /metrics, beside the operator's key; none: open while labels are off."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Of a worker's own /metrics; several workers of one `serve` count up from it; 0: none."""
    metrics_host: str = "127.0.0.1"
    """Address of a worker's own /metrics."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector (OTLP over HTTP) for traces; needs polypeft[otel]."""
    trace_share: float = Field(default=1.0, ge=0, le=1)
    """Of requests without a traceparent, the share that is traced."""
    supervisor_pid: int = 0
    """Internal: set by `serve` for its children, which end with it; 0: runs alone."""
    api_number: int = Field(default=0, ge=0)
    """Internal: which of the API processes this is; the first also does what only one has to do."""

    @field_validator("allowed_origins")
    @classmethod
    def _allowed_origins(cls, value: str | None) -> str | None:
        return None if value is None else ",".join(read_origins(value))

    @property
    def origins(self) -> list[str]:
        """Of the web pages that may call."""
        return self.allowed_origins.split(",") if self.allowed_origins else []

    @property
    def base_id(self) -> str:
        """What the API calls the base: a hub id without its revision, or a folder's name."""
        folder = Path(self.model).expanduser()
        return folder.resolve().name if folder.is_dir() else self.model.partition("@")[0]

    @property
    def operator_key_path(self) -> Path:
        """Where the operator's key lies; in the data directory, `serve` makes one."""
        return self.admin_key_file or self.data_dir / "admin.key"

    @property
    def run_dir(self) -> Path:
        """Where the running system's sockets lie.

        A Unix socket's path has 107 bytes at most: a long data_dir gets a short folder in the system's
        temporary one instead, named after it. The supervisor makes sure that it is ours alone.
        """
        inside = self.data_dir.absolute() / "run"
        if len(os.fsencode(inside)) <= LONGEST_RUN_DIR:
            return inside
        digest = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"polypeft-{digest}"

    @property
    def metrics_closed(self) -> bool:
        """/metrics takes a key: it names somebody, or the operator wants it so."""
        return self.metrics_token is not None or self.metrics_adapter_labels != "off"

    @property
    def usage_dir(self) -> Path:
        """Where records of usage lie until they are in the sums."""
        return self.data_dir / "usage"

    @property
    def figures_dir(self) -> Path:
        """Where processes keep their figures while one `serve` runs."""
        return self.run_dir / "figures"

    @property
    def engine_socket(self) -> str:
        return f"ipc://{self.run_dir / 'engine.sock'}"

    @property
    def store_url(self) -> str:
        return self.store or (self.data_dir / "store").absolute().as_uri()

    def to_env(self) -> dict[str, str]:
        """The environment under which a child process builds this same Settings."""
        given = self.model_dump(mode="json", exclude_none=True)
        return {f"POLYPEFT_{name.upper()}": str(value) for name, value in given.items()}


def child_environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with every POLYPEFT_* variable replaced by `settings`."""
    return inherited_environment() | settings.to_env()


def multiprocess_dir() -> Path | None:
    """Where several API processes sum their figures; `serve` tells prometheus_client, which reads it too."""
    folder = os.environ.get(MULTIPROCESS)
    return Path(folder) if folder else None


def inherited_environment() -> dict[str, str]:
    """This process's environment without our own variables, for programs that are not ours."""
    return {k: v for k, v in os.environ.items() if not k.startswith("POLYPEFT_")}
