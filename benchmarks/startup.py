"""From `polypeft serve`, with the model and its check cached, to the first token: seconds and memory.

    python -m benchmarks.startup                                   this checkout
    python -m benchmarks.startup --checkout ../before --checkout . both, in turns

Each round starts a server on the same data directory, waits for its API, asks for one token over HTTP and
ends it. `help` is `polypeft --help`; memory is of idle processes, resident, after the first token.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from server.settings import inherited_environment
from tests.same_answers.serving import READY, command_of

CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL = "smollm2-135m-instruct"
POLL_SECONDS = 0.02
START_SECONDS = 180.0
PROCESSES = {"api": "server.api", "engine": "server.engine"}


class Checkout:
    """A folder with the code, and a data directory that only its servers use."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder.resolve()
        self.command = command_of(self.folder)
        self.environment = inherited_environment() | {"PYTHONPATH": str(self.folder)}
        self.data = scratch / "data"
        self.data.mkdir(parents=True)
        (self.data / "models").symlink_to(CACHE / "models")

    def help(self) -> float:
        start = time.perf_counter()
        subprocess.run(
            [*self.command, "--help"], env=self.environment, cwd=self.folder, check=True, capture_output=True
        )
        return time.perf_counter() - start

    def start(self) -> dict[str, float]:
        """Seconds from the command to each event, and MiB of each process."""
        options = ["--port", "0", "--data-dir", str(self.data), "--kv-bytes", str(256 << 20)]
        with tempfile.TemporaryFile("w+") as out:
            begin = time.perf_counter()
            process = subprocess.Popen(
                [*self.command, "serve", *options],
                env=self.environment,
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.DEVNULL,
            )
            try:
                url = self._ready(process, out.fileno(), begin)
                found = {"ready": time.perf_counter() - begin}
                self._first_token(url)
                return found | {"first token": time.perf_counter() - begin} | self._memory(process)
            finally:
                process.terminate()
                process.wait(60)

    def _ready(self, process: "subprocess.Popen[bytes]", out: int, begin: float) -> str:
        while time.perf_counter() - begin < START_SECONDS and process.poll() is None:
            if found := READY.search(os.pread(out, 1 << 16, 0).decode()):
                return found[1]
            time.sleep(POLL_SECONDS)
        raise RuntimeError(f"{self.folder.name} did not become ready")

    def _first_token(self, url: str) -> None:
        key = (self.data / "admin.key").read_text().strip()
        body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
        with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
            made = client.post(
                "/admin/tenants", json={"name": "t"}, headers={"Authorization": f"Bearer {key}"}
            )
            tenant = {"Authorization": f"Bearer {made.raise_for_status().json()['key']}"}
            client.post("/v1/completions", json=body, headers=tenant).raise_for_status()

    def _memory(self, process: "subprocess.Popen[bytes]") -> dict[str, float]:
        found = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            line = " ".join(child.cmdline())
            for name, module in PROCESSES.items():
                if f"-m {module}" in line:
                    found[f"{name} MiB"] = child.memory_info().rss / (1 << 20)
        return found


def main(
    checkout: Annotated[
        list[Path] | None, typer.Option(help="Folders with the code; this one by default.")
    ] = None,
    repeats: int = 5,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path("startup.json"),
) -> None:
    """Measure, print medians, write JSON. The first start of each, which fills caches, is not counted."""
    folders = checkout or [Path()]
    results: dict[str, list[dict[str, float]]] = {str(folder): [] for folder in folders}
    with tempfile.TemporaryDirectory(prefix="polypeft-start-") as scratch:
        arms = {str(folder): Checkout(folder, Path(scratch) / str(i)) for i, folder in enumerate(folders)}
        for turn in range(repeats + 1):
            for name, arm in arms.items():
                measured = {"help": arm.help()} | arm.start()
                if turn:
                    results[name].append(measured)
    medians: dict[str, dict[str, Any]] = {
        name: {what: statistics.median(run[what] for run in runs) for what in runs[0]}
        for name, runs in results.items()
    }
    table = Table("s, MiB", *medians)
    for what in next(iter(medians.values())):
        table.add_row(what, *(f"{of[what]:.2f}" for of in medians.values()))
    Console().print(table)
    output.write_text(json.dumps({"medians": medians, "runs": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
