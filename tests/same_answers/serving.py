"""`polypeft` of any checkout, run as its users run it: the commands, and `serve` with what it keeps."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

READY = re.compile(r"is ready at (\S+)/v1$", re.MULTILINE)
START_SECONDS, STOP_SECONDS, CALL_SECONDS = 300.0, 60.0, 120.0
OPTIONS = ("--threads", "1", "--kv-bytes", str(64 << 20))


def command_of(checkout: Path) -> tuple[str, ...]:
    """`polypeft` of the code in a folder, by the entry point that it declares."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["polypeft"].partition(":")
    return sys.executable, "-c", f"from {module} import {name}; {name}()"


class Checkout:
    """A folder with the code, whose `server` package the processes import."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder.resolve()
        self.model = model.resolve()
        self.command = command_of(self.folder)

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """One command to its end."""
        return subprocess.run(
            [*self.command, *arguments],
            cwd=self.folder,
            env=self._environment() | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            check=False,
        )

    @contextmanager
    def serve(self, folder: Path, *options: str) -> Iterator[str]:
        """The server's URL, while one runs on `folder`/data; its words are in `folder`/out and /log."""
        command = [*self.command, "serve", "--model", str(self.model), "--port", "0"]
        with (folder / "out").open("wb") as out, (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--data-dir", str(folder / "data"), *OPTIONS, *options],
                cwd=self.folder,
                env=self._environment(),
                stdout=out,
                stderr=log,
            )
        try:
            yield _url(process, folder)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)

    def _environment(self) -> dict[str, str]:
        """Ours without the settings of another server; plain and narrow output, whatever the terminal."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("POLYPEFT_")}
        return kept | {"PYTHONPATH": str(self.folder), "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


def client(url: str, key: str | None = None) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=CALL_SECONDS, trust_env=False)


def operator_key(folder: Path) -> str:
    return (folder / "data" / "admin.key").read_text().strip()


def wait_for_jobs(tenant: httpx.Client, jobs: Sequence[str]) -> None:
    """Returns when they have ended, however."""
    deadline = time.monotonic() + START_SECONDS
    for job in jobs:
        while tenant.get(f"/v1/fine_tuning/jobs/{job}").json()["finished_at"] is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job} did not end within {START_SECONDS:g} s")
            time.sleep(0.1)


def _url(process: "subprocess.Popen[bytes]", folder: Path) -> str:
    """Returns when it is ready. Raises RuntimeError with the last of its log if it does not become so."""
    deadline = time.monotonic() + START_SECONDS
    while not (found := READY.search((folder / "out").read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text()[-4000:])
        time.sleep(0.05)
    return found[1]
