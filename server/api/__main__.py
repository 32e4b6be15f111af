"""`python -m server.api [--fd N]`: the API process, on an inherited listening socket or on host and port."""

import argparse
import resource
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.api.app import build_app
from server.api.http.connection import Connection
from server.api.services import Services
from server.child_process import run_child
from server.settings import Settings

# An idle connection's life: longer than clients keep theirs (httpx and the openai SDK: 5 s), or a request
# would now and then meet a connection that we are just closing.
KEEP_ALIVE_SECONDS = 75
LAST_SECONDS = 5  # for connections to close once nothing runs any more
OTHER_FILES = 1024  # files beside connections: sockets to Valkey, store and engine, and uploads
# A thread that checks training data holds the interpreter so long at a time: Python's own 5 ms, again and
# again, are felt in every stream of tokens.
SWITCH_SECONDS = 0.0005


class DrainingServer(uvicorn.Server):
    """On the first signal readiness falls, new work gets 503, and what runs may finish within the limit.

    A second signal ends it at once.
    """

    _ends_at = 0.0  # time.monotonic(); meaningful while draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        services = self._services
        if services is None or services.draining:
            super().handle_exit(sig, frame)
            return
        services.draining = True
        self._ends_at = time.monotonic() + services.settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to stop."""
        services = self._services
        if services is not None and services.refusal is not None:
            return True
        if services is not None and services.draining:
            late = time.monotonic() > self._ends_at
            if late:
                services.engine.drop_rows()  # so that their streams end in an error event, not in a cut
            if late or services.engine.rows == 0:
                return True
        return await super().on_tick(counter)

    @property
    def _services(self) -> Services | None:
        return getattr(self.config.app.state, "services", None)  # type: ignore[union-attr]


def serve(app: FastAPI, settings: Settings, fd: int | None) -> None:
    """Until a signal ends it. `fd` is a listening socket; None: one of its own.

    Raises StartupError for what is found only once Valkey and the store answer.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    raise_file_limit(settings.max_connections + OTHER_FILES)
    # not as uvicorn's own option `fd`: it takes every socket for a Unix one and leaves Nagle's algorithm on,
    # which holds an answer's body, and a stream's tokens, until the client acknowledges: 40 ms
    DrainingServer(server_config(app, settings)).run(None if fd is None else [socket.socket(fileno=fd)])
    services: Services | None = getattr(app.state, "services", None)
    if services is not None and services.refusal is not None:
        raise services.refusal


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )


def raise_file_limit(wanted: int) -> None:
    """Let this process open `wanted` files, or as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server.api")
    parser.add_argument("--fd", type=int, help="a listening socket to inherit, in place of host and port")
    fd: int | None = parser.parse_args().fd
    run_child("api", lambda settings: serve(build_app(settings), settings, fd))


if __name__ == "__main__":
    main()
