"""A worker's own figures: counted once, told once, shown on a port of its own."""

import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.errors import StartupError
from server.finetune.worker.metrics import AttemptCounters, WorkerMetrics
from server.metrics.names import FAMILIES, ON_WORKER


def page(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    for key in ON_WORKER:
        assert f"# TYPE {FAMILIES[key].shown} {FAMILIES[key].kind}\n" in text
    return {
        sample.name
        + "".join(f"[{value}]" for label, value in sample.labels.items() if label == "outcome"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_the_port_shows_attempts_done_and_under_way(tmp_path: Path) -> None:
    tally, port = WorkerMetrics("toy"), free_port()
    tally.serve("127.0.0.1", port)
    first = page(port)
    assert first["polypeft_worker_busy"] == 0
    assert first["polypeft_worker_attempts_total[crashed]"] == 0
    assert first["polypeft_process_resident_memory_bytes"] > 1e6
    for number, outcome in enumerate(("crashed", "finished")):
        folder = tmp_path / str(number)
        folder.mkdir()
        tally.begin(folder)
        assert page(port)["polypeft_worker_training_steps_total"] == number * 3, "nothing was trained yet"
        AttemptCounters(300, 3, 1, 1000, 2.5).write(folder)
        tally.heartbeat(answered=False)
        seen = page(port)
        assert seen["polypeft_worker_busy"] == 1
        assert seen["polypeft_worker_training_loss"] == 2.5
        assert seen["polypeft_worker_training_tokens_total"] == (number + 1) * 300
        assert 0 <= seen["polypeft_worker_heartbeat_age_seconds"] < 60
        tally.end(outcome)
    seen = page(port)
    assert seen["polypeft_worker_training_tokens_total"] == 600
    assert seen["polypeft_worker_checkpoint_bytes_total"] == 2000
    assert seen["polypeft_worker_attempts_total[finished]"] == 1
    assert seen["polypeft_worker_heartbeat_failures_total"] == 2
    assert seen["polypeft_worker_heartbeat_age_seconds"] == 0
    assert seen["polypeft_worker_training_loss"] == 2.5, "of the last update there was"


def test_what_is_told_is_told_once(tmp_path: Path) -> None:
    tally = WorkerMetrics("toy")
    tally.begin(tmp_path)
    AttemptCounters(100, 1).write(tmp_path)
    news = tally.unreported()
    assert news == {"training_tokens": 100, "training_steps": 1}
    assert tally.unreported() == news, "until it has been told"
    tally.mark_reported(news)
    assert tally.unreported() == {}
    AttemptCounters(250, 2, 1, 50).write(tmp_path)
    tally.end("finished")
    assert tally.unreported() == {
        "training_tokens": 150,
        "training_steps": 1,
        "checkpoints": 1,
        "checkpoint_bytes": 50,
        "attempts:finished": 1,
    }


def test_a_port_in_use_is_refused_with_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(StartupError, match=f"metrics_port {port}"):
            WorkerMetrics("toy").serve("127.0.0.1", port)
