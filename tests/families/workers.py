"""Cases judged in processes of their own, so that one that crashes or hangs is a verdict and not the end.

`python -m tests.families.workers` is such a process: it reads names of cases and writes verdicts, one a line.
"""

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from tests.families.cases import case_of
from tests.families.hostile import SEED, hostile
from tests.families.verdict import Verdict, judge

LIMIT_SECONDS = 300.0  # for one case, on a machine that is busy with others


class Worker:
    """A process that judges one case after the other; another takes its place when it has died."""

    def __init__(self) -> None:
        self.name = ""
        self.since = 0.0
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout
        return self.process.stdout

    @property
    def seconds(self) -> float:
        """Since it was given its case."""
        return time.monotonic() - self.since

    def begin(self, name: str) -> None:
        assert self.process.stdin
        self.name, self.since = name, time.monotonic()
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()

    def wait(self, limit: float = LIMIT_SECONDS) -> Verdict:
        """On the case that it was given; a process that takes longer than `limit` seconds is ended."""
        ready, _, _ = select.select([self.output], [], [], max(limit - self.seconds, 0))
        if ready and (line := self.output.readline()):
            return msgspec.json.decode(line, type=Verdict)
        seconds = self.seconds
        status = self.process.wait() if ready else None
        detail = (
            f"no verdict after {limit:.0f} s" if status is None else f"the process ended with status {status}"
        )
        self.close()
        self._start()
        return Verdict(self.name, "", "dies", detail, seconds=seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def verdicts(names: Iterable[str], workers: int = 1) -> Iterator[Verdict]:
    """Of each of these cases, as they come."""
    waiting = deque(names)
    with contextlib.ExitStack() as stack:
        idle = [Worker() for _ in range(min(workers, len(waiting)))]
        for worker in idle:
            stack.callback(worker.close)
        busy: list[Worker] = []
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop()
                worker.begin(waiting.popleft())
                busy.append(worker)
            ready, _, _ = select.select([worker.output for worker in busy], [], [], 1.0)
            for worker in [
                worker for worker in busy if worker.output in ready or worker.seconds > LIMIT_SECONDS
            ]:
                yield worker.wait()
                busy.remove(worker)
                idle.append(worker)


def main() -> None:
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no verdict
    for line in sys.stdin:
        name, since = line.strip(), time.monotonic()
        case = hostile(int(name.removeprefix(SEED))) if name.startswith(SEED) else case_of(name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdict = judge(case, Path(folder))
            except Exception as error:  # noqa: BLE001 (whatever a model raises is its verdict)
                traceback.print_exc()
                detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                verdict = Verdict(name, case.model_type, "dies", detail)
        verdict.seconds = time.monotonic() - since
        output.write(msgspec.json.encode(verdict) + b"\n")
        output.flush()


if __name__ == "__main__":
    main()
