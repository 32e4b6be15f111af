"""What all child processes of `serve` have in common: they end with their parent, and log why they fail.

`python -m server.child_process PID COMMAND...` runs another program so that it ends with process PID.
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

REFUSED = 78  # exit status (sysexits' EX_CONFIG) of a child whose configuration is wrong: no restart

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5

log = logging.getLogger(__name__)


def run_child(name: str, work: Callable[[Settings], None]) -> NoReturn:
    """The main function of a child: settings, logs, the tie to its parent, then `work(settings)`.

    Exit status REFUSED after a StartupError, which is logged as a sentence: `serve` stops. Exit status 1
    after another exception, logged with its traceback (a full disk: a sentence): `serve` restarts the child.
    """
    settings = Settings()
    configure_logs(settings, name)
    end_with_parent(settings.supervisor_pid)
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
    os._exit(
        status
    )  # skips the teardown of torch and numba, which takes seconds, and threads that may never end


def end_with_parent(supervisor_pid: int) -> None:
    """Have this process killed when its parent, process `supervisor_pid`, ends; 0: it has none.

    On Linux the kernel does it, whatever this process is doing, and also after an exec. Elsewhere a thread
    polls, so there it does not hold for a program that is exec'ed afterwards.
    """
    if supervisor_pid == 0:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_poll_parent, args=(supervisor_pid,), name="lifeline", daemon=True).start()
    if os.getppid() != supervisor_pid:  # it ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def _poll_parent(supervisor_pid: int) -> None:
    while os.getppid() == supervisor_pid:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - no shell is what we want
