"""`polypeft worker`: fine-tuning on this machine for servers on others, or beside one here."""

import asyncio
import os
import sys
from typing import Any

from server.cli.options import read_settings, signature_of
from server.logs import configure_logs
from server.settings import OFFLINE, child_environment

SETTINGS = (
    "model",
    "data_dir",
    "store",
    "store_config",
    "redis_url",
    "device",
    "dtype",
    "tool_format",
    "threads",
    "max_training_disk_bytes",
    "metrics_port",
    "metrics_host",
    "log_level",
    "log_format",
)


def worker(**options: Any) -> None:
    """Train jobs of servers that have the same model, --store and --redis-url. Ctrl-C hands a job on.

    Without --redis-url: of the server that runs on this --data-dir. A password is better given in
    POLYPEFT_REDIS_URL, where nobody else on this machine sees it.
    """
    from server.base_model.resolve import (
        resolve_model,  # these load more than the other commands should wait for
    )
    from server.supervisor.embedded_valkey import wait_until_answering
    from server.supervisor.resources import embedded_url
    from server.supervisor.system import COMMANDS, REDIS_SECONDS

    settings = read_settings(options)
    configure_logs(settings, "worker")
    resolve_model(settings)
    url = settings.redis_url or embedded_url(settings.run_dir)
    asyncio.run(wait_until_answering(url, REDIS_SECONDS))
    environment = child_environment(settings.model_copy(update={"redis_url": url})) | OFFLINE
    os.execve(sys.executable, [*COMMANDS["worker"]], environment)  # noqa: S606 - no shell is what we want


worker.__signature__ = signature_of(SETTINGS)  # type: ignore[attr-defined]
