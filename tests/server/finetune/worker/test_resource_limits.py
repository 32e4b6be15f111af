"""A process that restrains itself, seen from outside."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.finetune.worker.resource_limits import NICE, OOM_SCORE, oom_kills
from server.memory import machine_bytes

BODY = """
import json, os, resource, sys
from pathlib import Path
from server.finetune.worker.resource_limits import limit_resources, yield_to_others
yield_to_others()
limit_resources(file_bytes=1000, memory_bytes=200 << 20)
found = {"nice": os.nice(0), "core": resource.getrlimit(resource.RLIMIT_CORE)[0]}
if sys.platform == "linux":
    found["idle"] = os.sched_getscheduler(0) == os.SCHED_IDLE
    found["oom"] = int(Path("/proc/self/oom_score_adj").read_text())
    try:
        bytearray(300 << 20)
    except MemoryError:
        found["memory"] = "refused"
try:
    Path(sys.argv[1]).write_bytes(bytes(1001))
except OSError as error:
    found["file"] = os.strerror(error.errno)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("restraint") / "file"
    done = subprocess.run(
        [sys.executable, "-c", BODY, str(file)], capture_output=True, check=True, cwd=Path.cwd()
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_it_yields(found: dict[str, Any]) -> None:
    assert found["nice"] >= min(NICE, os.nice(0) + NICE)


def test_files_and_dumps_are_limited(found: dict[str, Any]) -> None:
    assert found["file"] == "File too large"
    assert found["core"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")
def test_what_only_linux_has(found: dict[str, Any]) -> None:
    assert found["idle"]
    assert found["oom"] == OOM_SCORE
    assert found["memory"] == "refused"
    assert 0 < machine_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert oom_kills() >= 0
