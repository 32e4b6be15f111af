"""Metrics of the whole system, read from Valkey: tenants, adapters, jobs, workers, and Valkey's own state.

Read on a scrape, at most every FRESH_SECONDS and for at most READ_SECONDS; what cannot be read is left out.
"""

import asyncio
import time
from collections import Counter

from redis.asyncio import Redis

from adapters_store.maintenance.counts import StoreCounts, store_counts
from adapters_store.valkey import store_errors
from server.errors import StoreError
from server.finetune.jobs.stats import JobStats, job_stats
from server.metrics import Metrics
from server.metrics.labels import OUTCOMES
from server.metrics.names import FLEET
from server.metrics.render import Labels, Values
from server.tenancy.tenant_keys import TENANTS
from server.tenancy.tenants import OPERATOR

FRESH_SECONDS = 2.0
COUNTS_FRESH_SECONDS = 10.0  # store_counts walks over all tenants
READ_SECONDS = 1.0


class ClusterMetrics:
    """Writes what it reads into `metrics.system`."""

    def __init__(self, redis: Redis, metrics: Metrics, *, losses: bool) -> None:
        """`losses`: also show the training loss of running jobs, which are tenants' data."""
        self._redis = redis
        self._losses = losses
        self._metrics = metrics
        self._refreshing = asyncio.Lock()
        self._read_at = self._counted_at = float("-inf")
        self._counts = StoreCounts(0, 0)

    async def refresh(self) -> None:
        """Read again if older than FRESH_SECONDS. Raises nothing: an absent Valkey is itself a metric."""
        async with self._refreshing:
            if time.monotonic() - self._read_at < FRESH_SECONDS:
                return
            try:
                async with asyncio.timeout(READ_SECONDS):
                    self._metrics.system = await self._read()
            except (StoreError, TimeoutError):
                self._metrics.system = {"valkey_up": [((), 0.0)]}
            self._read_at = time.monotonic()

    async def _read(self) -> Values:
        if time.monotonic() - self._counted_at > COUNTS_FRESH_SECONDS:
            self._counts = await store_counts(self._redis, TENANTS, OPERATOR.id)
            self._counted_at = time.monotonic()
        with store_errors():
            info = await self._redis.info()
        aof_failed = "err" in (info.get("aof_last_write_status"), info.get("aof_last_bgrewrite_status"))
        aof_failed |= info.get("min_slaves_good_slaves") == 0  # refuses writes: disk_reserve.py
        return {
            "valkey_up": [((), 1.0)],
            "valkey_aof_ok": [((), float(not aof_failed))],
            "valkey_memory": [((), float(info.get("used_memory", 0)))],
            "tenants": [((), float(self._counts.tenants))],
            "adapters_registered": [((), float(self._counts.adapters))],
            **_training_values(stats := await job_stats(self._redis)),
            "training_loss": _losses(stats) if self._losses else [],
        }


def _training_values(stats: JobStats) -> Values:
    counted = Counter(stats.counters)
    busy = sum(state.busy for state in stats.workers.values())
    plain = ("training_tokens", "training_steps", "checkpoints", "checkpoint_bytes")
    return {
        "jobs": [
            (("queued",), stats.queued),
            (("training",), stats.training),
            (("publishing",), stats.publishing),
        ],
        "jobs_finished": [
            ((status,), counted[f"finished:{status}"]) for status in FLEET["jobs_finished"].labels["status"]
        ],
        "job_silence": [((), stats.silence_seconds)],
        "workers": [(("idle",), len(stats.workers) - busy), (("busy",), busy)],
        "attempts": [((outcome,), counted[f"attempts:{outcome}"]) for outcome in OUTCOMES],
        **{key: [((), counted[key])] for key in plain},
    }


def _losses(stats: JobStats) -> list[tuple[Labels, float]]:
    return [((name,), state.loss) for name, state in stats.workers.items() if state.loss is not None]
