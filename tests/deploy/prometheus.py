"""Prometheus and promtool: Debian's own package, installed or unpacked into .cache/, which needs no root."""

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CACHE = ROOT / ".cache" / "prometheus"


@cache
def program(name: str) -> Path:
    """`prometheus` or `promtool`; fetched once by Debian's own client if the machine has none."""
    if found := shutil.which(name):
        return Path(found)
    unpacked = CACHE / "usr" / "bin" / name
    if not unpacked.exists():
        _unpack()
    return unpacked


def _unpack() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    fetch = ["apt-get", "download", "prometheus"]
    done = subprocess.run(fetch, cwd=CACHE, capture_output=True, text=True, check=False)
    if done.returncode:  # a new machine has no package lists; making them takes root
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        done = subprocess.run(fetch, cwd=CACHE, capture_output=True, text=True, check=False)
    packages = list(CACHE.glob("prometheus_*.deb"))
    assert packages, f"these tests need Debian's package prometheus: {done.stderr}"
    subprocess.run(["dpkg", "-x", str(packages[0]), str(CACHE)], check=True)
    packages[0].unlink()


def promtool(*arguments: str) -> str:
    """What it says; the test fails with that if promtool does."""
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def rules(name: str) -> list[dict[str, Any]]:
    """Every rule of deploy/prometheus/NAME.yaml."""
    groups = load(DEPLOY / "prometheus" / f"{name}.yaml")["groups"]
    return [rule for group in groups for rule in group["rules"]]
