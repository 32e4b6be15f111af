"""A real Prometheus over a server at work: every panel and every rule has data, and real faults raise alerts.

`--load-seconds 60` makes the tenants work longer, `--plots FOLDER` draws what was recorded.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from tests.deploy.load import train, upload, use
from tests.deploy.plant import TOKEN, Prometheus, Worker
from tests.deploy.plots import draw
from tests.deploy.queries import TARGET_LABELS, Query, conditions, grouped, named, panels, recordings
from tests.e2e.serving import Serving, ask
from tests.fixtures.models import load_model, make_lora
from tests.fixtures.s3 import Weed
from tests.waiting import until

pytestmark = pytest.mark.timeout(900)  # all of it passes before the first test: a minute, or three if busy
LINEARS = ("q_proj", "v_proj", "down_proj")
RANK = 64  # five adapters of it fill a tier of TIERS
# One of two cores, few slots, small tiers, little KV, a short queue: evictions, loads from everywhere, rows
# that are put back, waits and refusals come by themselves.
OPTIONS = ("--threads", "1", "--adapter-slots", "2", "--kv-bytes", str(1 << 20), "--max-seqs", "8")
TIERS = ("--adapter-ram-bytes", str(1 << 20), "--adapter-disk-bytes", str(1 << 20))
TOGETHER = ("--max-queue", "24", "--workers", "0")
FIGURES = ("--metrics-adapter-labels", "ids", "--metrics-token", TOKEN)

# What this test does not cause, or a CPU does not have
SILENT = {"fleet: GPU memory": "there is no GPU"}
ZERO = {
    "polypeft_non_finite_rows_total": "no adapter is broken",
    "polypeft_valkey_errors_total": "Valkey is never away",
    "polypeft_ledger_lost_records_total": "nor for so long that there is no room",
    "polypeft_worker_heartbeat_failures_total": "nor for workers",
}


class Site(NamedTuple):
    server: Serving
    worker: Worker
    store: Weed
    prometheus: Prometheus
    keys: dict[str, list[str]]  # tenants' keys, and the adapters of each
    loras: list[Path]
    noop: Path  # an adapter that changes nothing: refused


@pytest.fixture(scope="module")
def site(
    tiny_models: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("live")
    model, threads = tiny_models("llama"), torch.get_num_threads()
    torch.set_num_threads(1)
    store = Weed()
    at = ("--store", store.url(), "--store-config", str(store.config))
    server = Serving(str(model), folder / "serving", *OPTIONS, *TIERS, *TOGETHER, *FIGURES, *at)
    worker = Worker(str(model), server, folder, *at)
    base = load_model(model)
    loras = [
        make_lora(base, folder / f"lora{i}", seed=i, r=RANK, target_modules=list(LINEARS)) for i in range(9)
    ]
    noop = make_lora(base, folder / "noop", scale=0.0, r=2, target_modules=["q_proj"])
    prometheus = None
    try:
        store.start()
        server.start()
        worker.start()
        prometheus = Prometheus(folder / "prometheus", server.url, worker.port)
        prometheus.start()
        keys = {server.tenant(name): [f"{name}-{i}" for i in range(3)] for name in ("acme", "bmw", "citi")}
        yield Site(server, worker, store, prometheus, keys, loras, noop)
    finally:
        worker.kill()
        server.end()
        if prometheus is not None:
            prometheus.stop()
        store.end()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worked(site: Site, request: pytest.FixtureRequest) -> Site:
    """After uploads, misses, evictions, errors, a fine-tuning job, and four faults with their alerts."""
    seconds = request.config.getoption("--load-seconds")
    number = iter(range(len(site.loras)))
    for key, names in site.keys.items():
        for name in names:
            assert upload(site.server, key, name, site.loras[next(number)]) == 201
    first = next(iter(site.keys))
    assert upload(site.server, first, "noop", site.noop) == 400
    train(site.server, first, "llama", "tuned", 12)
    overload = ("PolypeftRejects", "PolypeftErrorBudgetBurnsFast")
    with site.prometheus.raises(*overload, explain=site.server.log):
        asyncio.run(use(site.server, site.keys, "llama", seconds))
    with site.server.sdk(first) as sdk:
        until(lambda: _done(sdk), site.worker.log, 240)
    assert [_asked(site, first, site.keys[first][0]) for _ in range(3)] == [200] * 3  # a miss, perhaps; hits
    kill_the_engine(site)
    spoil_the_disk(site)
    stop_the_store(site)
    kill_the_worker(site)
    if plots := request.config.getoption("--plots"):
        draw(site.prometheus, Path(plots))
    return site


def _done(sdk: Any) -> bool:
    return all(job.status == "succeeded" for job in sdk.fine_tuning.jobs.list())


def kill_the_engine(site: Site) -> None:
    with site.prometheus.raises("PolypeftEngineRestarts", explain=site.server.log):
        _new_engine(site)


def spoil_the_disk(site: Site) -> None:
    """The engine is new, and the disk all it has: it sees the damage, and takes them from the store."""
    with site.prometheus.raises("PolypeftAdapterCopiesCorrupt", explain=site.server.log):
        for copy in _copies(site):
            copy.write_bytes(b"spoilt")
        assert set(_ask_all(site)) == {200}


def stop_the_store(site: Site) -> None:
    """A new engine with an empty disk can have no adapter; the base goes on."""
    for copy in _copies(site):
        copy.unlink()
    _new_engine(site)
    alerts = ("PolypeftAdapterLoadsFail", "PolypeftStoreErrors", "PolypeftStoreBreakerOpen")
    with site.prometheus.raises(*alerts, explain=site.server.log):
        site.store.kill()
        answers = _ask_all(site)
        assert all(status >= 500 for status in answers), answers
        with site.server.http(next(iter(site.keys))) as client:
            assert ask(client, "llama", "the base", 2)
    site.store.start()
    until(lambda: _takes_files(site, next(iter(site.keys))), site.server.log)


def _new_engine(site: Site) -> None:
    site.server.kill("engine")
    until(lambda: not site.server.ready(), site.server.log)
    until(site.server.ready, site.server.log)


def _takes_files(site: Site, key: str) -> bool:
    """The store is back, and its breaker closed."""
    with site.server.http(key) as client:
        file = {"file": ("data.jsonl", b'{"text": "x"}\n')}
        answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files=file)
    return answer.status_code == httpx.codes.OK


def _asked(site: Site, key: str, model: str) -> int:
    with site.server.http(key) as client:
        asked = {"model": model, "prompt": "x", "max_tokens": 2}
        return client.post("/v1/completions", json=asked).status_code


def _ask_all(site: Site) -> list[int]:
    """Every adapter at once."""
    pairs = [(key, name) for key, names in site.keys.items() for name in names]
    with ThreadPoolExecutor(len(pairs)) as pool:
        return list(pool.map(lambda pair: _asked(site, *pair), pairs))


def _copies(site: Site) -> list[Path]:
    found = [path for path in (site.server.data_dir / "cache" / "adapters").rglob("*") if path.is_file()]
    assert found
    return found


def kill_the_worker(site: Site) -> None:
    key = next(iter(site.keys))
    train(site.server, key, "llama", "second", 40)
    with site.server.sdk(key) as sdk:
        until(lambda: "running" in {j.status for j in sdk.fine_tuning.jobs.list()}, site.worker.log)
    alerts = ("PolypeftWorkerDown", "PolypeftJobHeartbeatStale")
    with site.prometheus.raises(*alerts, explain=site.worker.log):
        site.worker.kill()
    train(site.server, key, "llama", "third", 1)  # which nobody takes
    queued = 'polypeft_jobs{state="queued"} > 0'
    until(lambda: site.prometheus.over_time(queued), site.server.log)


def test_every_panel_has_data(worked: Site) -> None:
    faults = [fault for query in panels() if (fault := _fault(worked.prometheus, query))]
    assert not faults, "\n".join(faults)


def test_every_rule_has_data(worked: Site) -> None:
    faults = [fault for query in recordings() if (fault := _fault(worked.prometheus, query))]
    assert not faults, "\n".join(faults)


def _fault(prometheus: Prometheus, query: Query) -> str | None:
    """What is wrong with a query's answer; None: nothing."""
    if query.where in SILENT:
        return None
    series = prometheus.over_time(query.text)
    values = [float(value) for one in series for _, value in one["values"]]
    known = [value for value in values if value == value]  # NaN: nothing happened in that window
    if not known:
        return f"no data: {query.where}: {query.text}"
    if not any(known) and not any(name in ZERO for name, _ in named(query.text)):
        return f"always 0: {query.where}: {query.text}"
    if missing := [label for one in series for label in query.labels - one["metric"].keys()]:
        return f"no {missing[0]} for its legend: {query.where}: {query.text}"
    return None


def test_every_metric_and_label_was_on_the_pages(worked: Site) -> None:
    """By name in what the server and the worker showed, not by the tables they are made from."""
    shown = worked.prometheus.shown()
    for query in [*panels(), *conditions()]:
        if query.where in SILENT:
            continue
        found = named(query.text)
        for name, labels in found:
            assert name in shown, f"{name} of {query.where}"
            assert labels <= shown[name] | TARGET_LABELS, f"{name} of {query.where}"
        everywhere = TARGET_LABELS.union(*(shown[name] for name, _ in found))
        assert grouped(query.text) <= everywhere, f"{query.where}: {query.text}"


def test_the_metrics_page_needs_its_token(site: Site) -> None:
    """What Prometheus sends is what opens it, and nothing less does."""
    assert httpx.get(f"{site.server.url}/metrics").status_code == 401
