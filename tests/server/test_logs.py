"""Log lines: one a record, whose, and none that a caller can forge."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from server.errors import NotFound
from server.logs import OUR_LOGGERS, WITHHELD, configure_logs, request_id, visible
from server.settings import Settings
from server.tenancy.keys import new_secret
from tests.waiting import PATIENCE

FORGED = "name\r\n2026-01-01T00:00:00Z INFO api: all is well\x1b[2J\u2028"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in (None, *OUR_LOGGERS)]
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


@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_never_stand_in_a_line(capsys: pytest.CaptureFixture[str], form: str) -> None:
    key, token = new_secret(), "a-token-for-metrics"
    configure_logs(Settings(log_format=form, metrics_token=token), "api")  # type: ignore[arg-type]
    log = logging.getLogger("server.test")
    log.warning("key %s, Authorization: Bearer %s, %s", key, "abc.def", token)
    log.warning("redis://user:hunter2@host:1/0 and https://h/x?password=hunter2&n=1")
    try:
        raise OSError(f"cannot reach redis://:hunter2@host with {key}")
    except OSError:
        log.exception("failed with %s", key)
    said = capsys.readouterr().err
    assert all(secret not in said for secret in (key, key[3:], "abc.def", token, "hunter2"))
    assert said.count("pp-***") == 3
    assert "cannot reach redis://***@host" in said


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_unforeseen_exception_says_where_and_not_what(
    capsys: pytest.CaptureFixture[str], form: str
) -> None:
    configure_logs(Settings(log_format=form), "api")  # type: ignore[arg-type]
    prompt = "the patient's name"
    try:
        try:
            dict[str, int]()[prompt]
        except KeyError as error:
            raise ValueError(prompt) from error
    except ValueError:
        logging.getLogger("server.test").exception("failed")
    said = capsys.readouterr().err
    assert "patient" not in said
    assert said.count(WITHHELD) == 2
    assert "KeyError" in said
    assert "ValueError" in said
    assert "test_an_unforeseen_exception" in said
    try:
        raise NotFound("There is no such job.")
    except NotFound:
        logging.getLogger("server.test").exception("failed")
    assert "There is no such job." in capsys.readouterr().err


def test_lines_name_the_request_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(Settings(), "api")
    token = request_id.set("req_1")
    logging.getLogger("server.test").warning("slow")
    configure_logs(Settings(log_format="json"), "api")
    logging.getLogger("server.test").warning("slow")
    request_id.reset(token)
    logging.getLogger("server.test").warning("nobody's")
    text, about, nobody = capsys.readouterr().err.splitlines()
    assert text.endswith("server.test: [req_1] slow")
    assert json.loads(about)["request_id"] == "req_1"
    assert "request_id" not in json.loads(nobody)


CHATTER = """
import logging, sys
from server.logs import configure_logs
from server.settings import Settings
configure_logs(Settings(), "api")
for number in range(5000):
    logging.getLogger("server.test").warning("%05d %s", number, "x" * (number % 1000))
print("done", flush=True)
sys.stdin.read()
for number in range(2):
    logging.getLogger("server.test").warning("after")
"""


def test_a_reader_that_takes_nothing_holds_nobody_up_and_finds_whole_lines() -> None:
    command = [sys.executable, "-c", CHATTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n", "while the pipe was full"
        assert process.stderr is not None
        assert process.stdin is not None
        said = [process.stderr.readline() for _ in range(50)]
        process.stdin.close()
        said += process.stderr.readlines()
    lines = [line.partition(" server.test: ")[2] for line in said]
    assert lines[-2:] == ["after\n", "after\n"], "it is heard again"
    assert len(lines) < 4000
    assert lines[:-2] == [f"{n:05} {'x' * (n % 1000)}\n" for n in range(len(lines) - 2)]


def test_a_reader_that_is_gone_holds_nobody_up() -> None:
    command = [sys.executable, "-c", CHATTER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stderr is not None
        process.stderr.close()
        assert process.stdout.readline() == "done\n"
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
