"""What the live test runs beside a server: a worker, and a Prometheus that scrapes both each second."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from server.settings import inherited_environment
from tests.deploy.prometheus import DEPLOY, load, program
from tests.e2e.serving import Serving, polypeft
from tests.fixtures.workers import WORKER
from tests.waiting import until

TOKEN = "a token for Prometheus alone"
WINDOW = "15s"  # in place of every window in the rules: faults must show within a test's patience
FIRING = 'ALERTS{alertstate="firing"}'
PATIENCE = 45.0  # seconds: fault, scrape, rule, alert
STALE = 4  # seconds of a worker's silence that raise its alert here


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Worker:
    """`polypeft worker` beside a server, on its Valkey."""

    def __init__(self, model: str, server: Serving, folder: Path, *store: str) -> None:
        self.port = free_port()
        options = ["--model", model, "--data-dir", str(server.data_dir), "--threads", "1", *store]
        self._command = [*polypeft(WORKER), "worker", *options, "--metrics-port", str(self.port)]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "worker.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=inherited_environment(), stderr=log, process_group=0
            )

    def kill(self) -> None:
        """It and the child that trains, as when a machine is gone."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PATIENCE)
            self._process = None

    def log(self) -> str:
        return (self._folder / "worker.log").read_text()


class Prometheus:
    """With the scrape configuration and rules of deploy/, at a test's pace."""

    def __init__(self, folder: Path, server: str, worker: int) -> None:
        folder.mkdir()
        self.url = f"http://127.0.0.1:{free_port()}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start_time = time.time()
        (folder / "token").write_text(TOKEN)
        config = load(DEPLOY / "prometheus" / "prometheus.yaml")
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        self.jobs = [job["job_name"] for job in config["scrape_configs"]]
        for job in config["scrape_configs"]:
            if "authorization" in job:
                job["authorization"]["credentials_file"] = str(folder / "token")
            to_server = job["job_name"] == "polypeft"
            address = server.removeprefix("http://") if to_server else f"127.0.0.1:{worker}"
            job["static_configs"] = [{"targets": [address]}]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            (folder / name).write_text(hurried((DEPLOY / "prometheus" / name).read_text()))

    def start(self) -> None:
        """Returns when it has read every page once: what is counted from now on has a beginning."""
        command = [str(program("prometheus")), f"--config.file={self._folder / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={self._folder / 'data'}"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}"]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._ready, self.log)
        until(lambda: all(self.over_time(f'up{{job="{job}"}} == 1') for job in self.jobs), self.log)

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def over_time(self, query: str) -> list[dict[str, Any]]:
        """Every series of the query, a point a second since the beginning."""
        span: dict[str, str | float] = {
            "query": query,
            "start": self.start_time,
            "end": time.time(),
            "step": 1,
        }
        answer = httpx.get(f"{self.url}/api/v1/query_range", params=span, timeout=30).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        series: list[dict[str, Any]] = answer["data"]["result"]
        return series

    def shown(self) -> dict[str, set[str]]:
        """Every metric it has read or recorded, with its labels."""
        span: dict[str, str | float] = {"match[]": '{__name__!=""}', "start": self.start_time}
        answer = httpx.get(f"{self.url}/api/v1/series", params=span, timeout=30).json()
        found: dict[str, set[str]] = {}
        for labels in answer["data"]:
            found.setdefault(labels["__name__"], set()).update(labels)
        return found

    def fired(self) -> set[str]:
        """Alerts that fire, or did."""
        return {series["metric"]["alertname"] for series in self.over_time(FIRING)}

    @contextmanager
    def raises(self, *alerts: str, explain: Callable[[], str]) -> Iterator[None]:
        """What happens inside makes these alerts fire, which never did before."""
        assert not (early := self.fired() & set(alerts)), early
        yield
        until(
            lambda: self.fired() >= set(alerts),
            lambda: f"{set(alerts) - self.fired()} are quiet: {explain()[-3000:]}",
            PATIENCE,
        )


def hurried(rules: str) -> str:
    """The same rules with short windows and waits, and a worker's silence noticed sooner."""
    rules = re.sub(r"\[\d+[mhd]\]", f"[{WINDOW}]", rules)
    rules = re.sub(r"for: [1-9]\d*[mh]", "for: 1s", rules)
    return rules.replace("heartbeat_age_seconds) > 60", f"heartbeat_age_seconds) > {STALE}")
