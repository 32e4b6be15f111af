"""What only Valkey knows, for /metrics: tenants, adapters, jobs, workers, and how Valkey itself is.

Read when somebody looks, at most every few seconds, and never waited for long: what cannot be read is not
shown.
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
from server.metrics.names import FLEET, OUTCOMES
from server.metrics.render import Labels, Values
from server.tenancy.tenants import OPERATOR, TENANTS

FRESH_SECONDS = 2.0
CENSUS_SECONDS = 10.0  # it walks over all tenants
PATIENCE_SECONDS = 1.0


class ClusterMetrics:
    def __init__(self, redis: Redis, metrics: Metrics, *, losses: bool) -> None:
        """`losses`: how some tenant's training goes is shown as well."""
        self._redis = redis
        self._losses = losses
        self._metrics = metrics
        self._reading = asyncio.Lock()
        self._read_at = self._counted_at = float("-inf")
        self._census = StoreCounts(0, 0)

    async def refresh(self) -> None:
        """Bring the figures up to date, unless they are. Raises nothing: Valkey's absence is a figure."""
        async with self._reading:
            if time.monotonic() - self._read_at < FRESH_SECONDS:
                return
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    self._metrics.system = await self._read()
            except (StoreError, TimeoutError):
                self._metrics.system = {"valkey_up": [((), 0.0)]}
            self._read_at = time.monotonic()

    async def _read(self) -> Values:
        if time.monotonic() - self._counted_at > CENSUS_SECONDS:
            self._census = await store_counts(self._redis, TENANTS, OPERATOR.id)
            self._counted_at = time.monotonic()
        with store_errors():
            info = await self._redis.info()
        aof_failed = "err" in (info.get("aof_last_write_status"), info.get("aof_last_bgrewrite_status"))
        aof_failed |= info.get("min_slaves_good_slaves") == 0  # it refuses writes: see supervisor/reserve.py
        return {
            "valkey_up": [((), 1.0)],
            "valkey_aof_ok": [((), float(not aof_failed))],
            "valkey_memory": [((), float(info.get("used_memory", 0)))],
            "tenants": [((), float(self._census.tenants))],
            "adapters_registered": [((), float(self._census.adapters))],
            **_of_training(found := await job_stats(self._redis)),
            "training_loss": _losses(found) if self._losses else [],
        }


def _of_training(found: JobStats) -> Values:
    counted = Counter(found.counters)
    busy = sum(state.busy for state in found.workers.values())
    plain = ("training_tokens", "training_steps", "checkpoints", "checkpoint_bytes")
    return {
        "jobs": [
            (("queued",), found.queued),
            (("training",), found.training),
            (("publishing",), found.publishing),
        ],
        "jobs_finished": [
            ((status,), counted[f"finished:{status}"]) for status in FLEET["jobs_finished"].labels["status"]
        ],
        "job_silence": [((), found.silence_seconds)],
        "workers": [(("idle",), len(found.workers) - busy), (("busy",), busy)],
        "attempts": [((how,), counted[f"attempts:{how}"]) for how in OUTCOMES],
        **{key: [((), counted[key])] for key in plain},
    }


def _losses(found: JobStats) -> list[tuple[Labels, float]]:
    return [((name,), state.loss) for name, state in found.workers.items() if state.loss is not None]
