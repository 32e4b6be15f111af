"""One child process: starts it, restarts it with capped backoff, stops it by SIGTERM, then SIGKILL.

Knows nothing of what the child does.
"""

import asyncio
import logging
import signal
import subprocess
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence

from server.child_process import REFUSED
from server.errors import StartupError

FIRST_DELAY_SECONDS = 0.25
MAX_DELAY_SECONDS = 15.0
STABLE_SECONDS = 60.0  # after this long a child counts as healthy: its next restart has the first delay

log = logging.getLogger(__name__)


class Child:
    """`start` it once, then await `supervise`; `stop` from another task ends both."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        stop_seconds: float,
        fds: tuple[int, ...] = (),
    ) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._stop_seconds = stop_seconds
        self._fds = fds
        self._process: Process | None = None
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        # Its own process group: Ctrl-C in a terminal reaches `serve` alone, which stops children in order.
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            pass_fds=self._fds,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        if self._stopping.is_set():  # while the process was being made
            self.kill()

    async def supervise(self, may_restart: Callable[[], bool]) -> None:
        """Restart the child each time it ends, while `may_restart()` is true; returns after `stop`.

        Raises StartupError if it refused to start, or ended while `may_restart()` was false.
        """
        failures = 0
        while self._process is not None:
            started = time.monotonic()
            status = await self._process.wait()
            if self._stopping.is_set():
                return
            if status == REFUSED:
                raise StartupError(f"The {self.name} process refused to start; its reason stands above.")
            if not may_restart():
                raise StartupError(
                    f"The {self.name} process {_exit_text(status)} before the server was ready."
                )
            failures = 0 if time.monotonic() - started > STABLE_SECONDS else failures + 1
            delay = min(FIRST_DELAY_SECONDS * 2 ** max(failures - 1, 0), MAX_DELAY_SECONDS)
            log.error("The %s process %s; it starts again in %.2f s", self.name, _exit_text(status), delay)
            try:
                await asyncio.wait_for(self._stopping.wait(), delay)
            except TimeoutError:
                await self.start()

    async def stop(self) -> None:
        """SIGTERM; after `stop_seconds`, SIGKILL. Returns when the process is gone."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._process is None:
            return
        try:
            await asyncio.wait_for(self._process.wait(), self._stop_seconds)
        except TimeoutError:
            log.warning("The %s process did not end within %g s and is killed", self.name, self._stop_seconds)
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, and no restart."""
        self._stopping.set()
        self.kill_process()

    def kill_process(self) -> None:
        """SIGKILL to the running process; `supervise` starts the next."""
        self._signal(signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        """Of the latest process; None before `start`."""
        return self._process.pid if self._process else None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)


def _exit_text(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
