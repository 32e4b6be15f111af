"""What `serve` owns before any child runs: the data directory, the folder of the sockets, the port."""

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from server.errors import StartupError
from server.settings import LONGEST_RUN_DIR, Settings


def make_data_dir(settings: Settings) -> None:
    """The data directory, made if it is missing. Raises StartupError where nothing can be written."""
    folder = settings.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> StartupError:
    return StartupError(f"--data-dir {str(folder)!r} cannot be used: {error.strerror}.")


@contextmanager
def locked_data_dir(settings: Settings) -> Iterator[None]:
    """The data directory, ours alone until the block ends or this process dies."""
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
    """`settings.run_dir` as a folder only this user can enter; what listens in it can be trusted.

    Raises StartupError when somebody else owns it (the name in a shared temporary folder is guessable) or
    when its path is too long for a socket.
    """
    folder = settings.run_dir
    if len(os.fsencode(folder)) > LONGEST_RUN_DIR:
        raise StartupError(
            f"The path {str(folder)!r} is too long for Unix sockets; set TMPDIR to a shorter one."
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StartupError(
            f"{str(folder)!r} belongs to somebody else, and the sockets of this server go there."
        )
    folder.chmod(0o700)
    return folder


def begin_figures(settings: Settings) -> None:
    """An empty folder for the figures of this `serve`: what an earlier one counted is not its own.

    On a disk without room there is none yet; whoever writes there makes it once there is.
    """
    shutil.rmtree(settings.figures_dir, ignore_errors=True)
    with suppress(OSError):
        settings.figures_dir.mkdir(mode=0o700)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A TCP socket that listens on host:port (0: any free one) and that children may inherit.

    It is bound before any child runs, and it outlives each of them: while the API restarts, connections
    wait in its backlog.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # which repeats the address
        raise StartupError(f"Cannot listen on {host}:{port}: {reason}.") from error
    with closing(listener):
        listener.set_inheritable(True)
        yield listener


def address_of(listener: socket.socket) -> str:
    """An URL under which this machine reaches `listener`."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
