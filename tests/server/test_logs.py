"""Log lines: one a record, whose, and none that a caller can forge."""

import json
import logging
from collections.abc import Iterator

import pytest

from server.logs import OURS, configure_logs, visible
from server.settings import Settings

FORGED = "name\r\n2026-01-01T00:00:00Z INFO api: all is well\x1b[2J\u2028"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, *OURS)]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers = handlers
        logger.setLevel(level)


def test_text_names_process_and_escapes_what_could_forge(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(), "engine")
    logging.getLogger("server.test").warning("got %s", FORGED)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert " WARNING engine server.test: got name\\r\\n2026" in lines[0]
    assert "\x1b" not in lines[0]


def test_json_is_one_object_a_line_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_format="json"), "api")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("server.test").exception("failed")
    line = json.loads(capsys.readouterr().err)
    assert (line["process"], line["level"], line["message"]) == ("api", "error", "failed")
    assert "ValueError" in line["exception"]


def test_libraries_are_heard_from_a_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_level="debug"), "api")
    logging.getLogger("server.test").debug("ours")
    logging.getLogger("httpx").info("chatter")
    logging.getLogger("httpx").warning("news")
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["ours", "news"]


def test_below_the_level_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_level="error"), "api")
    logging.getLogger("server.test").warning("quiet")
    assert capsys.readouterr().err == ""


def test_visible_keeps_what_it_is_told_to() -> None:
    assert visible("a\n\tb\x07", keep="\n\t") == "a\n\tb\\x07"
