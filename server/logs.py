"""One line a record, with the process's name and the request it is about, as text or JSON.

What must not be in a log is taken out here, whoever wrote it: keys, tokens and passwords by their form, and
what an unforeseen exception says, because that may be a piece of a prompt.
"""

import io
import logging
import os
import re
import select
import stat
import sys
import time
import traceback
from contextvars import ContextVar
from types import TracebackType

import msgspec

from server.errors import PolypeftError
from server.settings import Settings

OURS = ("server", "adapters_store", "__main__")  # the packages, and a child's own file
SAFE = (PolypeftError, OSError, RuntimeError, ImportError, MemoryError)  # made of no tenant's bytes
SAFE_MODULES = ("redis", "zmq", "obstore")
STDERR = 2
PIPE_SECONDS = 0.05  # for a reader of stderr that is slow, before lines are dropped
WITHHELD = "(its message is not logged: it may hold a tenant's text)"

_ESCAPED = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160), 0x2028, 0x2029]}
_SECRETS = (
    (re.compile(r"pp-[A-Za-z0-9_-]{16,}"), "pp-***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+\S+"), r"\1 ***"),
    (re.compile(r"://[^/@\s]*:[^/@\s]*@"), "://***@"),
    (re.compile(r"(?i)\b(password|secret|token|api_key|access_key_id)=[^\s&,]+"), r"\1=***"),
)

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that the running task is about."""


def configure_logs(settings: Settings, process: str) -> None:
    """Send this process's records to stderr in the chosen format. Call once, at the start.

    A pipe whose reader takes nothing is not waited for: lines are dropped until it does.
    The chosen level is for our own records; libraries are heard from a warning on.
    """
    handler = logging.StreamHandler(_Pipe.of_stderr() or sys.stderr)
    secrets = [settings.metrics_token] if settings.metrics_token else []
    form = _Json if settings.log_format == "json" else _Text
    handler.setFormatter(form(process, secrets))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())


def visible(text: str, keep: str = "") -> str:
    """`text` with its control characters escaped, which could forge a log line or steer a terminal."""
    return text.translate({code: seen for code, seen in _ESCAPED.items() if chr(code) not in keep})


class _Pipe(io.TextIOBase):
    """A pipe that nobody waits for: while its reader takes nothing, lines are dropped, and never cut."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor  # not blocking
        self._rest = b""  # of a line that did not fit whole

    @classmethod
    def of_stderr(cls) -> "_Pipe | None":
        """None where it is something else. Other processes write to it too, so it is opened anew for this."""
        try:
            if sys.stderr.fileno() != STDERR or not stat.S_ISFIFO(os.fstat(STDERR).st_mode):
                return None
            return cls(os.open(f"/proc/self/fd/{STDERR}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None

    def write(self, text: str) -> int:
        if self._rest:
            self._rest = self._sent(self._rest)
        if not self._rest:
            self._rest = self._sent(text.encode(errors="backslashreplace"))
            if self._rest:  # its reader may only be slow
                select.select([], [self._descriptor], [], PIPE_SECONDS)
                self._rest = self._sent(self._rest)
        return len(text)

    def _sent(self, data: bytes) -> bytes:
        """What is left of `data`. Of a pipe that is closed: nothing."""
        try:
            return data[os.write(self._descriptor, data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""


class _Redacting(logging.Formatter):
    def __init__(self, process: str, secrets: list[str], form: str | None = None) -> None:
        super().__init__(form)
        self.process = process
        self._secrets = secrets

    def redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for pattern, stars in _SECRETS:
            text = pattern.sub(stars, text)
        return text

    def formatException(  # noqa: N802 - logging's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """Each exception of the chain, the first one first: where, what, and its message if that is safe."""
        chain, error = list[BaseException](), ei[1]
        while error is not None and error not in chain:
            chain.append(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return self.redacted("\n".join(_told(error) for error in reversed(chain)))


class _Text(_Redacting):
    """`2026-01-31T12:00:00Z INFO engine server.engine.engine: message`; a traceback follows on its lines.

    A request's id stands before the message: `server.api.http.middleware: [req_0123] message`.
    """

    def __init__(self, process: str, secrets: list[str]) -> None:
        super().__init__(process, secrets, f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return time.strftime(datefmt or "%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        about = f"[{request_id.get()}] " if request_id.get() else ""
        record.message = about + self.redacted(visible(record.message))
        return super().formatMessage(record)


class _Json(_Redacting):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "process": self.process,
            "logger": record.name,
            "message": self.redacted(record.getMessage()),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def _told(error: BaseException) -> str:
    kind = type(error)
    safe = isinstance(error, SAFE) or kind.__module__.partition(".")[0] in SAFE_MODULES
    safe &= not isinstance(error, UnicodeError)
    frames = "".join(traceback.format_tb(error.__traceback__))
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"Traceback (most recent call last):\n{frames}{name}: {visible(str(error)) if safe else WITHHELD}"
