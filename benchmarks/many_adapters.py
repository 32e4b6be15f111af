"""Requests per second over 2,000 registered adapters under a power law, and over 5, with the same slots.

    python -m benchmarks.many_adapters                       # about seven minutes on two cores

One engine, SmolLM2-135M, LoRA r4 on q and v, a store in a folder; budgets far below what 2,000 adapters take,
so that device and RAM have to choose. Before anything counts, the tiers see some requests of one token by the
same law. Both arms ask for the same prompts and lengths, as many at a time, and take turns; the ratios of
turns next to each other count. More requests are open than rows can run, so that none waits for its adapter
in a place that stays empty (`--open 16` shows what that costs). Popularity is S-LoRA's power law. Memory is
looked at after every step: a tier over its budget ends the run. The process is set up as the engine's own
is.
"""

import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters_store.manifest import Manifest, content_digest, decode_manifest, encode_manifest
from adapters_store.names import blob_key, manifest_key
from adapters_store.object_store.store import Objects
from benchmarks.support.arms import quiet
from benchmarks.support.inputs import make_prompts
from benchmarks.support.machine import measure
from server.adapters.formats.safetensors import read_header
from server.base_model.default_model import ensure_default_model
from server.engine.engine import Engine
from server.memory import paused_garbage_collector
from server.messages import AdapterRef, Generate, Sampling
from server.settings import SPINS, Settings
from tests.fixtures.engine import publish
from tests.fixtures.models import make_lora

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MiB = 1 << 20
TENANTS = 20
FEW = 5
PROMPT = 32  # tokens
ANSWERS = 8, 25  # tokens, from and up to; rows that all end together hide what it costs to begin


def as_the_engine_runs() -> None:
    """Start anew with what the engine's process is given and libgomp reads once."""
    if not SPINS.items() <= os.environ.items():
        os.execve(sys.executable, [*sys.orig_argv], os.environ | SPINS)


def register(engine: Engine, model: Path, scratch: Path, count: int) -> list[AdapterRef]:
    """`count` adapters that differ in a few numbers each, spread over tenants."""
    folder = make_lora(model, scratch / "lora", target_modules=["q_proj", "v_proj"], r=4, scale=0.02)
    objects = Objects.open(engine.settings.store_url)
    first = publish(objects, engine.base, folder)
    manifest = decode_manifest(objects.get_sync(first.manifest_key))
    weights = bytearray(objects.get_sync(manifest.weights.key))
    store = engine.settings.data_dir / "store"
    rng = np.random.default_rng(0)
    start = _data_begins(folder / manifest.weights.name)
    numbers = np.frombuffer(weights, dtype=np.float32, offset=start)
    refs = []
    for i in track(range(count), "registering", console=Console(stderr=True)):
        numbers[rng.integers(len(numbers), size=64)] *= 1.01
        refs.append(_write(store, manifest, bytes(weights), f"ten-{i % TENANTS}", f"a{i}"))
    return refs


def _data_begins(path: Path) -> int:
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, max_header_bytes=MiB, max_tensors=10_000)
    return min(info.begin for info in header.values())


def _write(store: Path, like: Manifest, weights: bytes, tenant: str, name: str) -> AdapterRef:
    """Straight into the store's folder: two thousand uploads' fsyncs are not what is measured."""
    sha256 = hashlib.sha256(weights).hexdigest()
    blob = msgspec.structs.replace(like.weights, key=blob_key(tenant, sha256), sha256=sha256)
    digest = content_digest(like.method, like.base_digest, like.config, sha256)
    manifest = msgspec.structs.replace(like, tenant=tenant, name=name, digest=digest, files=[blob])
    key = manifest_key(tenant, name, 1)
    for path, data in ((store / blob.key, weights), (store / key, encode_manifest(manifest))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return AdapterRef(tenant, name, 1, digest, like.method, key)


class Load:
    """Keeps so many requests open at a time, and an eye on the engine's memory."""

    def __init__(self, engine: Engine, prompts: list[list[int]], most_open: int) -> None:
        self.engine = engine
        self.prompts = prompts
        self.most_open = most_open
        self.count = 0
        self.most: Counter[str] = Counter()

    def run(self, refs: list[AdapterRef], lengths: list[int]) -> float:
        """All these requests, in order; seconds."""
        waiting, open_rows = list(reversed([*zip(refs, lengths, strict=True)])), set[str]()
        start = time.perf_counter()
        while waiting or open_rows:
            while waiting and len(open_rows) < self.most_open:
                open_rows.add(self._submit(*waiting.pop()))
            chunks = self.engine.step()
            for chunk in chunks:
                if chunk.error:
                    raise RuntimeError(str(chunk.error))
                if chunk.finish:
                    open_rows.discard(chunk.id)
            if not chunks and not self.engine.scheduler.running:
                time.sleep(0.001)
            self.check()
        return time.perf_counter() - start

    def check(self) -> None:
        """Raises RuntimeError for a tier over its budget."""
        engine, settings = self.engine, self.engine.settings
        for tier, held, budget in (
            ("device", engine.cache.nbytes, settings.adapter_device_bytes),
            ("ram", engine.loader.ram.nbytes, settings.adapter_ram_bytes),
            ("disk", engine.loader.disk.nbytes, settings.adapter_disk_bytes),
        ):
            if held > budget:
                raise RuntimeError(f"{tier} holds {held} bytes of {budget}")
            self.most[tier] = max(self.most[tier], held)

    def _submit(self, ref: AdapterRef, length: int) -> str:
        self.count += 1
        prompt = self.prompts[self.count % len(self.prompts)]
        sampling = Sampling(max_tokens=length, temperature=0.0, ignore_eos=True)
        self.engine.submit(Generate(str(self.count), ref.tenant, prompt, sampling, ref))
        return str(self.count)


def main(
    adapters: int = 2000,
    alpha: Annotated[float, typer.Option(help="Of the power law; 1 is uniform, 0.1 extreme.")] = 0.3,
    requests: Annotated[int, typer.Option(help="Of a turn.")] = 200,
    turns: int = 6,
    warm: Annotated[int, typer.Option(help="Requests of one token before.")] = 2000,
    rows: int = 16,
    most_open: Annotated[int, typer.Option("--open", help="Requests, those that wait among them.")] = 24,
    slots: int = 64,
    threads: int = 2,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("many_adapters.json"),
) -> None:
    """Measure, compare, print a table, write JSON."""
    as_the_engine_runs()
    quiet()
    folder = ensure_default_model(CACHE)
    machine = measure(threads)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="polypeft-many-", ignore_cleanup_errors=True) as scratch:
        settings = Settings(
            data_dir=Path(scratch) / "data",
            threads=threads,
            prefix_cache=False,
            max_seqs=rows,
            adapter_slots=slots,
            adapter_device_bytes=64 * MiB,
            adapter_ram_bytes=128 * MiB,
            adapter_disk_bytes=512 * MiB,
        )
        with paused_garbage_collector():
            engine = Engine(settings, folder)
        refs = register(engine, folder, Path(scratch), adapters)
        load = Load(engine, make_prompts(folder, 64, PROMPT), most_open)
        resident = psutil.Process().memory_info().rss
        first = Load(engine, [load.prompts[0][:1]], most_open)
        first.run([refs[int(p * len(refs))] for p in rng.power(alpha, warm)], [1] * warm)
        engine.cache.hits = engine.cache.misses = 0
        engine.loader.observations.clear()
        arms = {"many": refs, "few": refs[:FEW]}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in track(range(-1, turns), "turns", console=Console(stderr=True)):
            lengths = rng.integers(*ANSWERS, requests).tolist()
            for name in ("many", "few") if turn % 2 else ("few", "many"):
                own = arms[name]
                picked = [own[int(p * len(own))] for p in rng.power(alpha, requests)]
                elapsed = load.run(picked, lengths)
                if turn >= 0:
                    seconds[name].append(elapsed)
        grown = psutil.Process().memory_info().rss - resident
        counters = {"adapter_hits": engine.cache.hits, "adapter_misses": engine.cache.misses}
        observed = engine.loader.observations
        loads = Counter(tier for name, tier, _ in observed if name == "adapter_load_seconds")
        engine.close()
    report = summary(seconds, requests, counters, loads) | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "job": {
            "adapters": adapters,
            "alpha": alpha,
            "requests": requests,
            "rows": rows,
            "open": most_open,
            "slots": slots,
            "warm": warm,
            "cores": os.cpu_count(),
        },
        "most_bytes": dict(load.most),
        "process_grew_bytes": grown,
    }
    table = Table(
        "adapters",
        "requests/s",
        "of 5",
        title=f"{most_open} open, {rows} rows, {slots} slots, alpha {alpha:g}",
    )
    table.add_row(str(adapters), f"{report['requests_per_s']['many']:.2f}", f"{report['ratio']:.3f}")
    table.add_row(str(FEW), f"{report['requests_per_s']['few']:.2f}", "1")
    Console().print(
        table, f"loads {dict(loads)}, most bytes {dict(load.most)}, process +{grown / MiB:.0f} MiB"
    )
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def summary(
    seconds: dict[str, list[float]], requests: int, counters: dict[str, int], loads: Counter[str]
) -> dict[str, Any]:
    pairs = zip(seconds["few"], seconds["many"], strict=True)
    asked = counters["adapter_hits"] + counters["adapter_misses"]
    return {
        "seconds": seconds,
        "requests_per_s": {name: requests / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(few / many for few, many in pairs),
        "device_hit_rate": counters["adapter_hits"] / asked,
        "loads": dict(loads),
    }


if __name__ == "__main__":
    typer.run(main)
