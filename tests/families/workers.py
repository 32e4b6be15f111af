"""Cases judged in processes of their own, so that one that crashes or hangs is a verdict and not the end.

`python -m tests.families.workers` is such a process: a case's name per line comes in, a verdict per line goes out.
"""

import contextlib
import os
import selectors
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
    """A process that judges, and the case it is at."""

    def __init__(self) -> None:
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.name = ""
        self.since = 0.0

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout
        return self.process.stdout

    def begin(self, name: str) -> None:
        assert self.process.stdin
        self.name, self.since = name, time.monotonic()
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()

    def verdict(self) -> Verdict:
        """Of the case that it was given; call when there is something to read."""
        line = self.output.readline()
        if line:
            return msgspec.json.decode(line, type=Verdict)
        status = self.process.wait()
        return Verdict(self.name, "", "dies", f"the process ended with status {status}", seconds=self.seconds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.stderr.close()


def verdicts(names: Iterable[str], workers: int = 1, limit: float = LIMIT_SECONDS) -> Iterator[Verdict]:
    """Of each of these cases, as they come."""
    waiting = deque(names)
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:

        def start() -> None:
            if waiting:
                worker = Worker()
                stack.callback(worker.close)
                selector.register(worker.output, selectors.EVENT_READ, worker)
                worker.begin(waiting.popleft())

        for _ in range(workers):
            start()
        while selector.get_map():
            ready = {key.data for key, _ in selector.select(1.0)}
            for worker in [key.data for key in selector.get_map().values()]:
                if worker not in ready and worker.seconds < limit:
                    continue
                if worker in ready:
                    verdict = worker.verdict()
                else:
                    verdict = Verdict(
                        worker.name, "", "dies", f"no verdict after {limit:.0f} s", seconds=limit
                    )
                yield verdict
                if worker in ready and worker.process.poll() is None and waiting:
                    worker.begin(waiting.popleft())
                    continue
                selector.unregister(worker.output)
                worker.close()
                start()


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
