"""One line a record, with the process's name, as text or JSON. Knows nothing of what is logged."""

import logging
import time

import msgspec

from server.settings import Settings

OURS = ("server", "adapters_store", "__main__")  # the packages, and a child's own file
_ESCAPED = {code: repr(chr(code))[1:-1] for code in [*range(32), *range(127, 160), 0x2028, 0x2029]}


def configure_logs(settings: Settings, process: str) -> None:
    """Send this process's records to stderr in the chosen format. Call once, at the start.

    The chosen level is for our own records; libraries are heard from a warning on.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Json(process) if settings.log_format == "json" else _Text(process))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())


def visible(text: str, keep: str = "") -> str:
    """`text` with its control characters escaped, which could forge a log line or steer a terminal."""
    return text.translate({code: seen for code, seen in _ESCAPED.items() if chr(code) not in keep})


class _Text(logging.Formatter):
    """`2026-01-31T12:00:00Z INFO engine server.engine.loop: message`; a traceback follows on its lines."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        return time.strftime(datefmt or "%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = visible(record.message)
        return super().formatMessage(record)


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
