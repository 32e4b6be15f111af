"""One system from start to stop: takes its resources, starts the children in order, restarts and stops them.

start   1. the engine, which takes longest and needs only the model
        2. at the same time Valkey; once it answers, the API processes
        3. the system is ready when GET /readyz of any API process is 200
        4. the fine-tuning workers; it does not wait for them
        5. from then on an engine that is silent for too long is killed
stop    1. the API drains, for at most drain_seconds, while workers save their training
        2. the engine, then Valkey. A second signal kills all
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

import httpx

from server.settings import MULTIPROCESS, OFFLINE, SPINS, Settings, child_environment
from server.supervisor.child import Child
from server.supervisor.resources import (
    address_of,
    clear_metrics_dir,
    embedded_url,
    listening,
    locked_data_dir,
    make_run_dir,
)

Commands = Mapping[str, Sequence[str]]
Prove = Callable[[str], Awaitable[None]]  # checks store and Valkey, whose URL it gets; raises StartupError

# the API gets `--fd N`, too: the listening socket that it inherits
COMMANDS: Commands = {
    "engine": (sys.executable, "-m", "server.engine"),
    "api": (sys.executable, "-m", "server.api"),
    "worker": (sys.executable, "-m", "server.finetune"),
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_SECONDS = 10.0  # of a child beside its drain; a worker saves its training within it
REDIS_SECONDS = 10.0  # for an external Valkey to answer
EMBEDDED_SECONDS = 120.0  # for the embedded Valkey, which may have a long file to load
POLL_SECONDS = 0.1

log = logging.getLogger(__name__)


async def _no_check(_redis_url: str) -> None:
    pass


def serve(
    settings: Settings,
    ready: Callable[[str], None],
    commands: Commands = COMMANDS,
    prove: Prove = _no_check,
) -> None:
    """Run the whole system until SIGTERM, SIGINT or SIGHUP. `ready(url)` is called once, when it answers.

    `prove(redis_url)` is awaited as soon as Valkey answers, before any child uses it or the store.
    Raises StartupError if the system cannot start; all children have ended by then.
    """
    with locked_data_dir(settings), listening(settings.host, settings.port) as listener:
        make_run_dir(settings)
        clear_metrics_dir(settings)
        asyncio.run(_run(settings, listener, ready, commands, prove))


async def _run(
    settings: Settings,
    listener: socket.socket,
    ready: Callable[[str], None],
    commands: Commands,
    prove: Prove,
) -> None:
    await _System(settings, listener, ready, commands, prove).run()


class _System:
    """The children of one `serve`, in the reverse order of their stop; those in one list stop together.

    Construct it inside its event loop.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        ready: Callable[[str], None],
        commands: Commands,
        prove: Prove,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._ready = ready
        self._commands = commands
        self._prove = prove
        self._valkey: list[Child] = []  # none with an external one
        self._engine: list[Child] = []
        self._clients: list[Child] = []  # of both: API processes and workers
        self._children = (self._valkey, self._engine, self._clients)
        self._tasks: list[asyncio.Task[None]] = []
        self._reserve: asyncio.Task[None] | None = None  # of disk space for an embedded Valkey
        self._was_ready = False
        self._end = asyncio.get_running_loop().create_future()  # set by a signal, failed by a StartupError

    async def run(self) -> None:
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        starting = self._spawn(self._start())
        try:
            await self._end
        finally:
            starting.cancel()
            if self._reserve is not None:
                self._reserve.cancel()
            for children in reversed(self._children):
                await asyncio.gather(*(child.stop() for child in children))
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _start(self) -> None:
        """Start all children, then watch the engine until cancelled."""
        settings = self._settings
        url = settings.redis_url or embedded_url(settings.run_dir)
        environment = _environment(settings, url)
        engine = Child("engine", self._commands["engine"], environment, STOP_SECONDS)
        await self._add(self._engine, engine)
        await self._start_valkey(url)
        await self._prove(url)
        for number in range(settings.api_processes):
            await self._add(self._clients, self._api(number, environment))
        await _wait_until_ready(address_of(self._listener))
        self._was_ready = True
        self._ready(address_of(self._listener))
        for number in range(settings.workers):
            variables = environment | _worker_port(settings, number)
            worker = Child(f"worker {number + 1}", self._commands["worker"], variables, STOP_SECONDS)
            await self._add(self._clients, worker)
        from server.supervisor.silent_engine import kill_silent

        await kill_silent(engine, settings.engine_socket, settings.request_seconds)

    async def _start_valkey(self, url: str) -> None:
        """Start the embedded Valkey, unless the operator has named another; returns once it answers."""
        from server.supervisor import embedded_valkey as valkey  # its client loads while the engine does

        settings = self._settings
        if settings.redis_url is not None:
            await valkey.wait_until_answering(url, REDIS_SECONDS)
            return
        await valkey.stop_orphan(url)
        command = valkey.embedded_command(settings)
        await self._add(self._valkey, Child("valkey", command, child_environment(settings), STOP_SECONDS))
        await valkey.wait_until_answering(url, EMBEDDED_SECONDS)
        self._reserve = self._spawn(valkey.keep_disk_reserve(settings, url))

    def _api(self, number: int, environment: dict[str, str]) -> Child:
        """An API process. All accept from one listening socket, so no connection waits for one that died."""
        settings, fd = self._settings, self._listener.fileno()
        variables = {MULTIPROCESS: str(settings.figures_dir), "POLYPEFT_API_NUMBER": str(number)}
        return Child(
            "api" if settings.api_processes == 1 else f"api {number + 1}",
            [*self._commands["api"], "--fd", str(fd)],
            environment | variables,
            settings.drain_seconds + STOP_SECONDS,
            fds=(fd,),
        )

    async def _add(self, group: list[Child], child: Child) -> None:
        group.append(child)
        await child.start()
        self._spawn(child.supervise(may_restart=lambda: self._was_ready))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_done)
        self._tasks.append(task)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._end.done():
            self._end.set_exception(error)

    def _on_signal(self) -> None:
        if not self._end.done():
            self._end.set_result(None)
            return
        for children in self._children:
            for child in children:
                child.kill()


def _environment(settings: Settings, redis_url: str) -> dict[str, str]:
    """Environment of engine, API and workers: Valkey's URL, the parent's pid, thread options, no hub.

    The model has been fetched before they start.
    """
    passed = settings.model_copy(update={"redis_url": redis_url, "supervisor_pid": os.getpid()})
    return SPINS | child_environment(passed) | OFFLINE


def _worker_port(settings: Settings, number: int) -> dict[str, str]:
    """Each worker serves its metrics on a port of its own, in sequence."""
    port = settings.metrics_port and settings.metrics_port + number
    return {"POLYPEFT_METRICS_PORT": str(port)}


async def _wait_until_ready(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=2.0) as client:
        while True:
            try:
                if (await client.get("/readyz")).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                log.debug("The API does not answer yet")
            await asyncio.sleep(POLL_SECONDS)
