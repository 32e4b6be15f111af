"""What /metrics takes from Valkey: read when asked for, not too often, and never waited for long."""

import time

import pytest
from redis.asyncio import Redis

from adapters_store.valkey import connect
from server.api import cluster_metrics
from server.api.cluster_metrics import ClusterMetrics
from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.stats import report
from server.metrics import Metrics
from server.supervisor.disk_reserve import REFUSE_WRITES
from tests.fixtures.jobs import fixed

pytestmark = pytest.mark.anyio


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize("losses", [True, False])
async def test_jobs_and_workers_are_shown_and_losses_if_wanted(
    redis: Redis, jobs: Jobs, losses: bool
) -> None:
    metrics = Metrics("toy")
    await jobs.create(fixed())
    await report(redis, "w1", True, 2.5, {"training_tokens": 7, "attempts:crashed": 2})
    await report(redis, "w2", False, None, {})
    await ClusterMetrics(redis, metrics, losses=losses).refresh()
    assert value(metrics, "polypeft_jobs", state="queued") == 1
    assert (
        value(metrics, "polypeft_workers", state="busy")
        == value(metrics, "polypeft_workers", state="idle")
        == 1
    )
    assert value(metrics, "polypeft_training_tokens_total") == 7
    assert value(metrics, "polypeft_training_attempts_total", outcome="crashed") == 2
    assert value(metrics, "polypeft_training_loss", worker="w1") == (2.5 if losses else None)
    assert value(metrics, "polypeft_valkey_up") == value(metrics, "polypeft_valkey_aof_ok") == 1


async def test_a_valkey_that_refuses_writes_is_told_of(redis: Redis) -> None:
    metrics = Metrics("toy")
    await redis.config_set(REFUSE_WRITES, 1)
    try:
        await ClusterMetrics(redis, metrics, losses=False).refresh()
    finally:
        await redis.config_set(REFUSE_WRITES, 0)
    assert value(metrics, "polypeft_valkey_up") == 1
    assert value(metrics, "polypeft_valkey_aof_ok") == 0


async def test_what_was_just_read_is_not_read_again(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics("toy")
    figures = ClusterMetrics(redis, metrics, losses=False)
    await figures.refresh()
    await report(redis, "w1", False, None, {"training_tokens": 7})
    await figures.refresh()
    assert value(metrics, "polypeft_training_tokens_total") == 0
    monkeypatch.setattr(cluster_metrics, "FRESH_SECONDS", 0.0)
    await figures.refresh()
    assert value(metrics, "polypeft_training_tokens_total") == 7


async def test_a_valkey_that_is_gone_is_a_figure_and_the_rest_is_not_shown() -> None:
    metrics = Metrics("toy")
    client = connect("redis://127.0.0.1:1/0")
    start = time.monotonic()
    await ClusterMetrics(client, metrics, losses=False).refresh()
    assert time.monotonic() - start < 30
    assert value(metrics, "polypeft_valkey_up") == 0
    assert value(metrics, "polypeft_jobs", state="queued") is None
    assert metrics.render()
    await client.aclose()
