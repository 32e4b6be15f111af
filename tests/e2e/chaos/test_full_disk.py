"""A data directory on a disk filled to its last byte: what cannot be written is given up before service.

A tmpfs of its own stands for the disk, which takes the right to mount one.
"""

import contextlib
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import Serving, ask, body, files_of, push
from tests.waiting import PATIENCE, until

DISK_BYTES = 96 << 20
FULL_SECONDS = 6.0  # under load with not one byte free
PROMPT = "What is the capital of France?"
EXAMPLES = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 2000


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk of a test's own takes the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", f"size={DISK_BYTES}") as folder:
        yield folder


@pytest.fixture
def server(tiny: Path, disk: Path) -> Iterator[Serving]:
    it = Serving(
        str(tiny), disk / "serving", *OPTIONS, "--adapter-slots", "2", "--adapter-ram-bytes", "1048576"
    )
    try:
        it.start()
        it.pid("worker")
        yield it
    finally:
        it.end()


def fill(disk: Path) -> Path:
    """Take every block that is free, and those that become free while it is filled."""
    ballast = disk / "ballast"
    for size in (1 << 20, 4096, 1):
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(size))
    return ballast


class Load:
    """Tenants at work: each of `calls` again and again on a thread of its own, until `stop`."""

    def __init__(self, **calls: Callable[[], httpx.Response]) -> None:
        self.seen: dict[str, Counter[int]] = {name: Counter() for name in calls}
        self.refusals: dict[str, str] = {}
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=call) for call in calls.items()]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str, call: Callable[[], httpx.Response]) -> None:
        while not self._stopping.is_set():
            answer = call()
            self.seen[name][answer.status_code] += 1
            if answer.status_code >= 500:
                self.refusals[name] = answer.text


def uploaded(http: httpx.Client, name: str, folder: Path) -> int:
    return http.post("/v1/adapters", data={"name": name}, files=files_of(folder)).status_code


def test_a_disk_filled_under_load_kills_nothing_and_inference_goes_on(
    server: Serving, disk: Path, lora: Callable[[int], Path], golden: Callable[..., str]
) -> None:
    with server.http(server.tenant("full")) as http, server.http(server.operator) as operator:
        names = [f"a{seed}" for seed in range(4)]
        for seed, name in enumerate(names):
            push(http, name, lora(seed))
        turn = iter(range(10**9))
        load = Load(
            base=lambda: http.post("/v1/completions", json=body("llama", PROMPT)),
            adapter=lambda: http.post("/v1/completions", json=body(names[next(turn) % 4], PROMPT)),
            metrics=lambda: http.get("/metrics"),
            ready=lambda: http.get("/readyz"),
            upload=lambda: http.post("/v1/adapters", data={"name": "x"}, files=files_of(lora(0))),
            file=lambda: http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": EXAMPLES}),
            tenant=lambda: operator.post("/admin/tenants", json={"name": "n"}),
            alias=lambda: http.post("/v1/adapters/a0/aliases", json={"alias": "live", "version": 1}),
        )
        processes = server.pids()
        ballast = fill(disk)
        try:
            time.sleep(FULL_SECONDS)
        finally:
            load.stop()
        assert server.pids() == processes, server.log()
        for name in ("base", "adapter", "metrics", "ready"):
            assert set(load.seen[name]) == {200}, (name, load.seen, load.refusals)
        for name in ("upload", "file", "tenant", "alias"):
            assert set(load.seen[name]) <= {200, 201, 503, 507}, (name, load.seen, load.refusals)
        assert load.seen["upload"][507]
        assert load.seen["file"][507]
        assert "insufficient_storage" in load.refusals["upload"]
        assert http.delete("/v1/adapters/a3", params={"purge": "true"}).status_code == 200, "makes room"
        ballast.unlink()
        until(lambda: uploaded(http, "y", lora(1)) == 201)
        assert operator.post("/admin/tenants", json={"name": "back"}).status_code == 201
        for seed, name in enumerate(names[:3]):
            assert ask(http, name, PROMPT) == golden(lora(seed), PROMPT)
        assert server.pids() == processes, server.log()
    server.stop()


def test_a_read_only_data_directory_is_refused_with_a_sentence(tiny: Path, tmp_path: Path) -> None:
    it = Serving(str(tiny), tmp_path / "serving", *OPTIONS)
    with mounted(it.data_dir, "ro"):
        assert it.launch().wait(PATIENCE) == 1
    assert "Traceback" not in it.log()
    assert "cannot be used: Read-only file system." in it.log()
