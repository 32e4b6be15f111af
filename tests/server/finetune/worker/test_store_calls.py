"""Calls of the store are counted once, whichever process makes them, also after it is gone."""

from pathlib import Path

from prometheus_client import CollectorRegistry

from server.finetune.worker.metrics import WorkerMetrics
from server.finetune.worker.store_calls import StoreCalls, metric_values, read_calls
from server.metrics.labels import OPERATIONS
from server.metrics.names import SHARED

LAST = len(SHARED["store_seconds"].buckets)


def sample(tally: WorkerMetrics, name: str, **labels: str) -> float | None:
    registry = CollectorRegistry()
    registry.register(tally)
    return registry.get_sample_value(name, {"process": "worker", **labels})


def gets(tally: WorkerMetrics) -> float | None:
    return sample(tally, "polypeft_store_call_seconds_count", operation="get")


def test_a_call_falls_in_its_bucket_and_a_failure_counts_too(tmp_path: Path) -> None:
    calls = StoreCalls(tmp_path)
    calls.on_call("get", 1e-6, "done")
    calls.on_call("get", 1e6, "failed")
    calls.on_call("juggle", 0.0, "refused")
    assert read_calls(tmp_path) == calls.calls(), "what another process reads"
    values, counts = metric_values(calls.calls())
    buckets, total = {labels[1]: (found, total) for labels, found, total in counts["store_seconds"]}["get"]
    assert (buckets[0], buckets[LAST], sum(buckets)) == (1, 1, 2)
    assert total == 1e6 + 1e-6
    errors = dict(values["store_errors"])
    assert errors["worker", "get", "failed"] == errors["worker", "other", "refused"] == 1
    assert sum(errors.values()) == 2


def test_nothing_that_was_called_yet_is_shown_as_zero(tmp_path: Path) -> None:
    assert read_calls(tmp_path) == {}
    _, counts = metric_values({})
    assert [labels for labels, _, _ in counts["store_seconds"]] == [("worker", name) for name in OPERATIONS]
    assert not any(sum(found) for _, found, _ in counts["store_seconds"])


def test_a_worker_shows_its_own_calls_and_those_of_every_attempt(tmp_path: Path) -> None:
    tally = WorkerMetrics("toy")
    tally.store.on_call("get", 0.1, "done")
    assert gets(tally) == 1
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        tally.begin(folder)
        child = StoreCalls(folder)
        for _ in range(10):
            child.on_call("get", 0.1, "failed")
        assert gets(tally) == 1 + 10 * (attempt + 1), "the attempt runs"
        tally.end("finished")
        assert gets(tally) == 1 + 10 * (attempt + 1), "it is over"
    assert sample(tally, "polypeft_store_errors_total", operation="get", outcome="failed") == 20


def test_a_disk_that_is_full_costs_no_call(tmp_path: Path) -> None:
    calls = StoreCalls(tmp_path / "gone")
    calls.on_call("put", 0.1, "done")
    assert calls.calls()["put:seconds"] == 0.1
