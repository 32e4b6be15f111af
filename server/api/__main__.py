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
from server.base_model.tokenizer import forbid_torch
from server.child_process import run_child
from server.errors import InvalidField, StartupError
from server.settings import Settings
from server.tenancy.key_terms import as_ipv6, check_addresses

# Of an idle connection. Longer than clients keep theirs (httpx and the openai SDK: 5 s), as otherwise a
# request would sometimes reach a connection that is being closed.
KEEP_ALIVE_SECONDS = 75
SHUTDOWN_SECONDS = 5  # for connections to close once no request runs
OTHER_FILES = 1024  # open files beside connections: sockets to Valkey, store and engine, and uploads
# How long a thread that checks training data may hold the interpreter at a time. Python's default of 5 ms
# would delay every stream of tokens again and again.
SWITCH_INTERVAL_SECONDS = 0.0005


class DrainingServer(uvicorn.Server):
    """On the first signal the server drains: it is not ready, new requests get 503, running ones may finish
    within `drain_seconds`. A second signal ends it at once.
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
        """Whether to stop; uvicorn asks ten times a second."""
        services = self._services
        if services is not None and services.startup_error is not None:
            return True
        if services is not None and services.draining:
            overdue = time.monotonic() > self._ends_at
            if overdue:
                services.engine.drop_rows()  # so that their streams end with an error event
            if overdue or services.engine.rows == 0:
                return True
        return await super().on_tick(counter)

    @property
    def _services(self) -> Services | None:
        return getattr(self.config.app.state, "services", None)  # type: ignore[union-attr]


def serve(app: FastAPI, settings: Settings, fd: int | None) -> None:
    """Serve until a signal. `fd` is an inherited listening socket; None: bind host and port.

    Raises StartupError for faults that are found only once Valkey and the store answer.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    raise_file_limit(settings.max_connections + OTHER_FILES)
    # not by uvicorn's option `fd`: it treats every socket as a Unix one and leaves Nagle's algorithm on,
    # which delays an answer's body, and a stream's tokens, until the client acknowledges: 40 ms
    DrainingServer(server_config(app, settings)).run(None if fd is None else [socket.socket(fileno=fd)])
    services: Services | None = getattr(app.state, "services", None)
    if services is not None and services.startup_error is not None:
        raise services.startup_error


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """uvicorn's configuration, with our Connection as its HTTP protocol."""
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
        proxy_headers=settings.trusted_proxies is not None,
        forwarded_allow_ips=trusted_networks(settings.trusted_proxies),
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def trusted_networks(proxies: str | None) -> list[str]:
    """The networks in `trusted_proxies`, as uvicorn takes them. Raises StartupError for what is none."""
    if proxies is None:
        return []
    try:
        networks = check_addresses([part.strip() for part in proxies.split(",")], "--trusted-proxies")
    except InvalidField as error:
        raise StartupError(error.message, param="trusted_proxies") from None
    return [*networks, *(as_ipv6(network) for network in networks)]


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
    forbid_torch()
    run_child("api", lambda settings: serve(build_app(settings), settings, fd))


if __name__ == "__main__":
    main()
