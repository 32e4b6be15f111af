"""Every setting, once. The only file that reads the environment (POLYPEFT_*).

The command line builds a Settings; child processes rebuild the same one from `to_env()`.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MiB = 1 << 20
LONGEST_RUN_DIR = 90  # bytes; leaves room for a socket's own name


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="POLYPEFT_", frozen=True, extra="forbid")

    # what is served, and where
    # the default model, a local folder, or a hub id "owner/name[@revision]"
    model: str = Field(default="smollm2-135m-instruct", min_length=1)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    data_dir: Path = Path("data")
    store: str | None = None  # URL of the object store; None: a folder in data_dir
    redis_url: str | None = None  # None: an embedded Valkey in data_dir
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(default=0, ge=0)  # 0: all cores this process may use

    # the engine
    max_seqs: int = Field(default=32, ge=1, le=1024)  # rows in a batch
    max_model_len: int = Field(default=0, ge=0)  # 0: the base's own context
    max_batch_tokens: int = Field(default=512, ge=16)  # tokens in a step: chunked prefill beside decode
    kv_bytes: int = Field(default=1024 * MiB, ge=MiB)
    prefix_cache: bool = True

    # the adapter cache, tier by tier
    adapter_slots: int = Field(default=64, ge=1, le=4096)
    adapter_device_bytes: int = Field(default=2048 * MiB, ge=MiB)
    adapter_ram_bytes: int = Field(default=2048 * MiB, ge=MiB)
    adapter_disk_bytes: int = Field(default=16384 * MiB, ge=MiB)

    # what a caller may ask for; GET /v1/limits shows all of it
    max_queue: int = Field(default=256, ge=1)  # rows waiting, all tenants together
    max_n: int = Field(default=8, ge=1)
    max_stop: int = Field(default=8, ge=1)
    max_stop_chars: int = Field(default=256, ge=1)
    max_top_logprobs: int = Field(default=20, ge=0)
    max_logit_bias: int = Field(default=300, ge=0)
    max_prompts: int = Field(default=16, ge=1)
    max_body_bytes: int = Field(default=4 * MiB, ge=1024)
    max_lora_rank: int = Field(default=256, ge=1)
    max_upload_bytes: int = Field(default=1024 * MiB, ge=1024)
    max_upload_files: int = Field(default=32, ge=1)
    max_tensors: int = Field(default=20_000, ge=1)
    max_header_bytes: int = Field(default=8 * MiB, ge=1024)
    max_adapters_per_tenant: int = Field(default=10_000, ge=1)
    request_seconds: float = Field(default=600.0, gt=0)  # the longest a request may take
    drain_seconds: float = Field(default=30.0, ge=0)
    lora_folder: Path | None = None  # where /v1/load_lora_adapter may read; None: the route is off

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    supervisor_pid: int = 0  # set by `serve` for its children, which end with it; 0: runs alone

    @property
    def base_id(self) -> str:
        """What the API calls the base: a hub id without its revision, or a folder's name."""
        folder = Path(self.model).expanduser()
        return folder.resolve().name if folder.is_dir() else self.model.partition("@")[0]

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


def inherited_environment() -> dict[str, str]:
    """This process's environment without our own variables, for programs that are not ours."""
    return {k: v for k, v in os.environ.items() if not k.startswith("POLYPEFT_")}
