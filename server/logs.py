"""Log format: one line for each record, as text or JSON, with the process's name and the request's id.

Secrets are removed here from all records, those of libraries too: keys, tokens and passwords by their form,
and the message of an unforeseen exception, because it may quote a prompt.
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

OUR_LOGGERS = ("server", "adapters_store", "__main__")  # __main__: the file that a child process runs
# exceptions whose messages contain no tenant's bytes: these, and those of these packages
SAFE_EXCEPTIONS = (PolypeftError, OSError, RuntimeError, ImportError, MemoryError)
SAFE_PACKAGES = ("redis", "zmq", "obstore")
STDERR = 2
PIPE_SECONDS = 0.05  # the wait for a slow reader of stderr, before lines are dropped
WITHHELD = "(its message is not logged: it may hold a tenant's text)"

_ESCAPED = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160), 0x2028, 0x2029]}
_SECRETS = (
    (re.compile(r"pp-[A-Za-z0-9_-]{16,}"), "pp-***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+\S+"), r"\1 ***"),
    (re.compile(r"://[^/@\s]*:[^/@\s]*@"), "://***@"),
    (re.compile(r"(?i)\b(password|secret|token|api_key|access_key_id)=[^\s&,]+"), r"\1=***"),
)

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that the current task handles; "" outside of requests."""


def configure_logs(settings: Settings, process: str) -> None:
    """Send this process's records to stderr in the chosen format. Call once, at the start.

    If stderr is a pipe that is not read, lines are dropped; logging never blocks for long. The chosen level
    is for our own records; libraries log from WARNING on.
    """
    handler = logging.StreamHandler(_NonBlockingPipe.of_stderr() or sys.stderr)
    secrets = [settings.metrics_token] if settings.metrics_token else []
    formatter = _JsonFormatter if settings.log_format == "json" else _TextFormatter
    handler.setFormatter(formatter(process, secrets))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(settings.log_level.upper())


def visible(text: str, keep: str = "") -> str:
    """`text` with control characters escaped, except those in `keep`.

    Unescaped they could forge a log line or control a terminal.
    """
    return text.translate({code: escape for code, escape in _ESCAPED.items() if chr(code) not in keep})


class _NonBlockingPipe(io.TextIOBase):
    """Writes lines to a pipe. While the pipe is full, whole lines are dropped; no line is cut."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor  # in non-blocking mode
        self._rest = b""  # of a line that was written in part

    @classmethod
    def of_stderr(cls) -> "_NonBlockingPipe | None":
        """Stderr, if it is a pipe. It is opened again, since other processes share its file description."""
        try:
            if sys.stderr.fileno() != STDERR or not stat.S_ISFIFO(os.fstat(STDERR).st_mode):
                return None
            return cls(os.open(f"/proc/self/fd/{STDERR}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None

    def write(self, text: str) -> int:
        if self._rest:
            self._rest = self._send(self._rest)
        if not self._rest:
            self._rest = self._send(text.encode(errors="backslashreplace"))
            if self._rest:  # the reader may only be slow
                select.select([], [self._descriptor], [], PIPE_SECONDS)
                self._rest = self._send(self._rest)
        return len(text)

    def _send(self, data: bytes) -> bytes:
        """Write what the pipe takes; returns the rest, which is empty for a closed pipe."""
        try:
            return data[os.write(self._descriptor, data) :]
        except BlockingIOError:
            return data
        except OSError:
            return b""


class _RedactingFormatter(logging.Formatter):
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
        """Each exception of the chain, the cause first: traceback, type, and the message if it is safe."""
        chain, error = list[BaseException](), ei[1]
        while error is not None and error not in chain:
            chain.append(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return self.redacted("\n".join(_describe(error) for error in reversed(chain)))


class _TextFormatter(_RedactingFormatter):
    """`2026-01-31T12:00:00Z INFO engine server.engine.engine: message`; a traceback follows on its lines.

    A request's id is put before the message: `server.api.asgi.middleware: [req_0123] message`.
    """

    def __init__(self, process: str, secrets: list[str]) -> None:
        super().__init__(process, secrets, f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return time.strftime(datefmt or "%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        prefix = f"[{request_id.get()}] " if request_id.get() else ""
        record.message = prefix + self.redacted(visible(record.message))
        return super().formatMessage(record)


class _JsonFormatter(_RedactingFormatter):
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


def _describe(error: BaseException) -> str:
    kind = type(error)
    safe = isinstance(error, SAFE_EXCEPTIONS) or kind.__module__.partition(".")[0] in SAFE_PACKAGES
    safe &= not isinstance(error, UnicodeError)
    frames = "".join(traceback.format_tb(error.__traceback__))
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"Traceback (most recent call last):\n{frames}{name}: {visible(str(error)) if safe else WITHHELD}"
