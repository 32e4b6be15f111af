"""What `serve` takes before any child runs: the data directory, the folder of sockets, the listening port."""

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from server.errors import StartupError
from server.settings import LONGEST_RUN_DIR, Settings


def make_data_dir(settings: Settings) -> None:
    """Create the data directory if it is missing. Raises StartupError if it is not writable."""
    folder = settings.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> StartupError:
    return StartupError(f"--data-dir {str(folder)!r} cannot be used: {error.strerror}.")


def valkey_socket(run_dir: Path) -> Path:
    return run_dir / "valkey.sock"


def embedded_url(run_dir: Path) -> str:
    """The URL of the embedded Valkey, which listens in `run_dir` alone."""
    return f"unix://{quote(str(valkey_socket(run_dir)))}"


@contextmanager
def locked_data_dir(settings: Settings) -> Iterator[None]:
    """Lock the data directory until the block or this process ends. Raises StartupError."""
    folder = settings.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(folder / "serve.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise StartupError(f"--data-dir {str(folder)!r} is in use by another polypeft serve.") from None
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def make_run_dir(settings: Settings) -> Path:
    """Create `settings.run_dir` for this user alone, so that its sockets can be trusted.

    Raises StartupError if another user owns it (its name in a shared temporary folder can be guessed) or if
    its path is too long for a socket.
    """
    folder = settings.run_dir
    if len(os.fsencode(folder)) > LONGEST_RUN_DIR:
        raise StartupError(
            f"The path {str(folder)!r} is too long for Unix sockets; set TMPDIR to a shorter one."
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StartupError(
            f"{str(folder)!r} belongs to somebody else, and the sockets of this server go there."
        )
    folder.chmod(0o700)
    return folder


def clear_metrics_dir(settings: Settings) -> None:
    """Empty the folder of this system's metrics, which may hold those of an earlier `serve`.

    On a full disk it is missing at first; the processes that write metrics create it later.
    """
    shutil.rmtree(settings.figures_dir, ignore_errors=True)
    with suppress(OSError):
        settings.figures_dir.mkdir(mode=0o700)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket that listens on host:port (0: any free port) and that children can inherit.

    It is bound before any child runs and outlives each: while the API restarts, connections wait in its
    backlog. Raises StartupError.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # the rest repeats the address
        raise StartupError(f"Cannot listen on {host}:{port}: {reason}.") from error
    with closing(listener):
        listener.set_inheritable(True)
        yield listener


def address_of(listener: socket.socket) -> str:
    """A URL of `listener` for clients on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
