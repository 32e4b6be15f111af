"""Log lines: one a record, whose, and none that a caller can forge."""

import json
import logging
from collections.abc import Iterator

import pytest

from server.logs import configure_logs, visible
from server.settings import Settings

FORGED = "name\r\n2026-01-01T00:00:00Z INFO api: all is well\x1b[2J\u2028"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level


def test_text_names_process_and_escapes_what_could_forge(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(), "engine")
    logging.getLogger("test").warning("got %s", FORGED)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert " WARNING engine test: got name\\r\\n2026" in lines[0]
    assert "\x1b" not in lines[0]


def test_json_is_one_object_a_line_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_format="json"), "api")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("test").exception("failed")
    line = json.loads(capsys.readouterr().err)
    assert (line["process"], line["level"], line["message"]) == ("api", "error", "failed")
    assert "ValueError" in line["exception"]


def test_below_the_level_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(log_level="error"), "api")
    logging.getLogger("test").warning("quiet")
    assert capsys.readouterr().err == ""


def test_visible_keeps_what_it_is_told_to() -> None:
    assert visible("a\n\tb\x07", keep="\n\t") == "a\n\tb\\x07"
