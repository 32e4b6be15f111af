"""What every child process of `serve` does around its own work: it ends with its parent, and says why not.

`python -m server.child_process PID COMMAND...` is the same for a program that is not ours.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from server.errors import StartupError, disk_error
from server.logs import configure_logs
from server.settings import Settings

REFUSED = 78  # exit status of a child that cannot start as it is configured (sysexits' EX_CONFIG): no restart

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


def run_child(name: str, work: Callable[[Settings], None]) -> NoReturn:
    """The whole of a child's main: settings from the environment, logs, lifeline, then `work(settings)`.

    A StartupError becomes one logged sentence and status REFUSED, on which `serve` gives up; a full disk
    a sentence and any other exception a traceback, and status 1, on which it restarts the child.
    """
    settings = Settings()
    configure_logs(settings, name)
    hold(settings.supervisor_pid)
    status = 0
    try:
        work(settings)
    except StartupError as refusal:
        log.error("%s", refusal.message)
        status = REFUSED
    except Exception as error:
        if disk_error(error):
            log.error("The %s process cannot go on: its disk is full or read-only.", name)
        else:
            log.exception("The %s process failed", name)
        status = 1
    logging.shutdown()
    os._exit(status)  # at once: torch and numba take seconds to tear down, and a thread may never end


def hold(supervisor_pid: int) -> None:
    """From here on this process is killed when process `supervisor_pid` ends; 0: it runs alone.

    Linux does it in the kernel, whatever this process is busy with, and also across exec. Elsewhere a
    thread looks for it, so a program that is exec'ed after is not held there.
    """
    if supervisor_pid == 0:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(supervisor_pid,), name="lifeline", daemon=True).start()
    if os.getppid() != supervisor_pid:  # it ended before we held on
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(supervisor_pid: int) -> None:
    while os.getppid() == supervisor_pid:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    hold(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is what we want
