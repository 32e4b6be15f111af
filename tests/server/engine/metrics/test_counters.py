"""What the engine counts: bounded, kept across its restarts, and true of rows that really ran."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine.metrics.counters import EngineMetrics, Mode
from server.engine.metrics.top_labels import REVIEW_SECONDS, TopLabels
from server.engine.scheduling.row import Row
from server.engine.snapshot import stats
from server.messages import AdapterRef, Cancel, Chunk, Generate, Sampling, Stats, Timing
from server.metrics import Metrics
from server.metrics.labels import WAITS
from tests.fixtures.engine import Driver, Stand, run
from tests.fixtures.models import build_tiny
from tests.waiting import PATIENCE

TOP = 8


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("figures")
    build_tiny("llama", folder / "model")
    stand = Stand(
        folder / "model",
        folder / "data",
        3,
        adapter_slots=2,
        max_seqs=2,
        metrics_adapter_labels="names",
        metrics_top=TOP,
    )
    yield stand
    stand.engine.close()


def series(found: Stats, key: str) -> dict[tuple[str, ...], float]:
    return {labels: value for name, labels, value in found.series if name == key}


def observed(found: Stats, key: str) -> dict[tuple[str, ...], int]:
    return {labels: sum(counts) for name, labels, counts, _ in found.histograms if name == key}


def test_rows_that_ran_are_told_by_phase_tenant_and_adapter(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stand.engine
    asked, read = threading.Event(), engine.loader.objects.read_sync

    def read_once_asked(*given: Any) -> None:
        """No adapter is there before its rows wait for it, however slow the steps are."""
        assert asked.wait(PATIENCE)
        read(*given)

    monkeypatch.setattr(engine.loader.objects, "read_sync", read_once_asked)
    driver = Driver(engine)
    for i in range(12):
        driver.submit(stand.generate(i, stand.refs[i % 3], tenant=f"ten_{i % 2}"))
    driver.step()
    asked.set()
    driver.finish()
    done = driver.rows.values()
    assert not any(each.error for each in done)
    found = stats(engine, "boot")
    tokens = sum(len(each.tokens) for each in done)
    assert found.counters["generation_tokens"] == tokens
    assert sum(series(found, "tenant_generation_tokens").values()) == tokens
    assert sum(series(found, "adapter_requests").values()) == 12
    assert series(found, "tenant_requests")["ten_0",] == 6
    assert observed(found, "queue_seconds") == {(): 12}
    assert observed(found, "request_prompt_tokens") == {(): 12}
    assert found.counters.get("adapter_hits", 0) + found.counters["adapter_misses"] == 12
    assert found.counters["adapter_misses"] >= 3
    assert series(found, "adapter_evictions")["device",] > 0, "3 adapters on 2 slots"
    assert series(found, "adapter_load_bytes")["store",] > 0
    steps = found.counters["steps"]
    phases = observed(found, "step_seconds")
    assert {phases[phase,] for phase in ("schedule", "forward", "sample", "deliver")} == {steps}
    assert 0 < phases["adapter",] <= steps // 16 + 1
    assert observed(found, "batch_rows") == observed(found, "batch_tokens") == {(): steps}
    assert set(series(found, "waiting_by_reason")) == {(reason,) for reason in WAITS}
    waits = observed(found, "wait_seconds")
    assert waits["adapter",] >= 3
    assert waits["capacity",] > 0, "12 rows, 2 at a time"


def test_a_row_says_when_it_did_what(stand: Stand) -> None:
    cold = stand.adapter("cold", seed=7)
    timing = told_of(stand, stand.generate(1, cold))
    assert timing.source == "store"
    assert timing.arrived < timing.started < timing.first_token
    assert timing.load is not None
    assert timing.waited["adapter"] == pytest.approx(timing.load[1] - timing.load[0])
    warm = told_of(stand, stand.generate(2, cold))
    assert (warm.source, warm.load) == ("device", None)
    assert told_of(stand, stand.generate(3, None)).source == ""


def told_of(stand: Stand, command: Generate) -> Timing:
    """What its first chunk, and no other, says."""
    chunks: list[Chunk] = []
    stand.engine.submit(command)
    while stand.engine.busy:
        chunks += stand.engine.step()
    assert chunks[0].timing is not None
    assert not any(chunk.timing for chunk in chunks[1:])
    return chunks[0].timing


def test_what_fails_is_told_by_reason(stand: Stand) -> None:
    before = stats(stand.engine, "boot")
    ref = stand.adapter("gone", seed=8)
    stand.objects.delete_sync(ref.manifest_key)
    (done,) = run(stand.engine, [stand.generate(1, ref, tenant="ten_0")])
    assert done.error is not None
    found = stats(stand.engine, "boot")
    key = "adapter_load_failures"
    assert series(found, key)["missing",] - series(before, key).get(("missing",), 0) == 1
    key = "tenant_failures"
    assert series(found, key)["ten_0",] - series(before, key)["ten_0",] == 1
    assert observed(found, "queue_seconds") == observed(before, "queue_seconds"), "it never ran"


def test_a_row_that_is_cancelled_counts_for_its_tenant(stand: Stand) -> None:
    before = stats(stand.engine, "boot")
    driver = Driver(stand.engine)
    driver.submit(stand.generate(4, None, tenant="ten_1"))
    while not driver.rows["row-4"].tokens:
        driver.step()
    driver.cancel("row-4")
    found = stats(stand.engine, "boot")
    key = "tenant_requests"
    assert series(found, key)["ten_1",] - series(before, key)["ten_1",] == 1
    stand.engine.submit(Cancel("row-4"))
    assert series(stats(stand.engine, "boot"), key) == series(found, key), "it is gone"


def test_running_adapters_are_listed_as_routers_want_them(stand: Stand) -> None:
    engine = stand.engine
    for i in range(4):
        engine.submit(stand.generate(i, stand.refs[i % 3]))
    seen = set()
    while engine.busy:
        engine.step()
        seen |= {labels for key, labels, _ in stats(engine, "b").series if key == "lora_info"}
    assert {labels[0] for labels in seen} == {"2"}
    names = {name for labels in seen for listed in labels[1:] for name in listed.split(",") if name}
    assert names == {"a0", "a1", "a2"}
    assert max(len(labels[1].split(",")) for labels in seen) == 2, "2 rows at a time"


def test_the_next_engine_goes_on_where_this_one_was(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "engine"

    def engine() -> EngineMetrics:
        return EngineMetrics(path, "ids", TOP)

    def value(found: Stats, key: str) -> float:
        return found.counters.get(key, 0.0)

    totals = []
    for boot in range(3):
        figures = engine()
        for steps in (4.0, 5.0):
            figures.set_count("steps", steps)
            figures.count("adapter_hits", 2)
            figures.observe("batch_rows", 3)
            figures.tenants.add(("ten_1",), 1, {"tenant_requests": 1})
            found = figures.report(str(boot), {}, [])
            totals.append(
                (value(found, "steps"), value(found, "adapter_hits"), observed(found, "batch_rows")[()])
            )
            assert value(found, "engine_restarts") == boot
            assert series(found, "tenant_requests")["ten_1",] == len(totals)
    assert totals == [(4, 2, 1), (5, 4, 2), (9, 6, 3), (10, 8, 4), (14, 10, 5), (15, 12, 6)]


@pytest.mark.parametrize("content", [b"", b"no msgpack", b"\x95\x01\x90\x90\x90"])
def test_a_file_that_cannot_be_read_is_a_beginning(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "engine"
    path.write_bytes(content)
    assert EngineMetrics(path).report("boot", {}, []).counters == {"engine_restarts": 0}


def test_a_disk_that_takes_nothing_stops_no_engine_and_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.write_text("in the way")
    figures = EngineMetrics(folder / "engine")
    figures.count("generation_tokens", 3)
    for _ in range(3):
        assert figures.report("boot", {}, []).counters["generation_tokens"] == 3
    assert len(caplog.records) == 1
    folder.unlink()
    figures.report("boot", {}, [])
    assert EngineMetrics(folder / "engine").counters["generation_tokens", ()] == 3


def test_what_other_threads_and_the_loader_say_is_taken_if_it_is_known() -> None:
    figures = EngineMetrics()
    figures.on_store_call("get", 0.1, "done")
    figures.on_store_call("sing", 0.1, "failed")
    figures.add_observations(
        [
            ("adapter_load_seconds", "disk", 0.02),
            ("adapter_load_seconds", "a tenant's name", 1.0),
            ("surprise", "", 1.0),
        ]
    )
    found = figures.report("boot", {}, [])
    assert observed(found, "store_seconds") == {("engine", "get"): 1, ("engine", "other"): 1}
    assert series(found, "store_errors") == {("engine", "other", "failed"): 1}
    assert observed(found, "adapter_load_seconds") == {("disk",): 1}


@pytest.mark.parametrize(("mode", "added"), [("off", 0), ("ids", 5 * TOP * 2)])
def test_10000_tenants_and_adapters_add_a_known_number_of_series(mode: Mode, added: int) -> None:
    """5 counters for each of TOP tenants and as many for adapters; those of `other` are there anyway."""
    figures = EngineMetrics(None, mode, TOP)
    metrics = Metrics("toy")
    metrics.absorb(figures.report("boot", {}, []))
    before = metrics.render().count(b"\n") - metrics.render().count(b"# ")
    sampling = Sampling(max_tokens=1)
    for i in range(10_000):
        adapter = AdapterRef(f"ten_{i}", f"name-{i}", 1, f"{i:016x}", "lora", "")
        command = Generate(str(i), f"ten_{i}", [1, 2], sampling, adapter)
        row = Row(command, 0, tokens=[1, 2, 3], prompt_length=2)
        row.timing.started = row.timing.first_token = 1.0
        figures.record_end(row, 2.0, error="non_finite_logits" if i % 7 == 0 else "")
        figures.review(float(i))
    found = figures.report("boot", {}, [])
    metrics.absorb(found)
    page = metrics.render()
    seen = page.count(b"\n") - page.count(b"# ")
    assert seen - before <= added + 10  # and what rows that end add, whoever's they are
    assert seen - before >= added
    if mode == "ids":
        assert sum(series(found, "tenant_requests").values()) <= 10_000
        assert len(figures.tenants._scores) <= 9 * TOP + 1
    else:
        assert b"ten_" not in page


def test_the_busy_get_places_and_no_series_falls() -> None:
    busiest = TopLabels(("n",), 1, 2)
    shown: dict[tuple[str, ...], float] = {}
    chance = random.Random(1)
    for minute in range(20):
        for _ in range(200):
            busy = chance.random() < 0.8
            name = chance.choice(["big", "large"]) if busy else f"small-{chance.randrange(1000)}"
            busiest.add((name,), 1, {"n": 1})
        busiest.review(minute * REVIEW_SECONDS)
        now = {label: value for _, label, value in busiest.series()}
        assert len(now) <= 3
        for label, value in now.items():
            assert value >= shown.get(label, 0), label
        shown = now
    assert set(shown) == {("big",), ("large",), ("other",)}


def test_without_places_all_is_other() -> None:
    busiest = TopLabels(("n",), 2, 0)
    for i in range(100):
        busiest.add((f"t{i}", "a"), 1, {"n": 1})
        busiest.review(i * REVIEW_SECONDS)
    assert dict.fromkeys(busiest.counts) == {("other", "other"): None}
    assert busiest.counts["other", "other"]["n"] == 100


def test_the_step_timer_changes_no_token(stand: Stand) -> None:
    """The timed step sees banks through a wrapper: the same rows give the same tokens in every step."""
    rows = [stand.generate(i, stand.refs[i % 3]) for i in range(6)]
    first = run(stand.engine, rows)
    stand.engine.step_timer._steps += 7  # so that other steps are the timed ones
    again = run(stand.engine, rows)
    assert [each.tokens for each in first] == [each.tokens for each in again]
