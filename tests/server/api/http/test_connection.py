"""What a client may send before it has sent a request, and how long it may keep a connection for nothing."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import httpx
import pytest

from server.api.http import connection
from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, started
from tests.waiting import until

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


def connected(system: System) -> socket.socket:
    host, port = system.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while piece := client.recv(65536):
        found += piece
    return found


def answered(system: System, request: bytes) -> list[int]:
    """The statuses of what comes for `request`, until the server closes."""
    with closing(connected(system)) as client:
        client.sendall(request)
        return statuses(read_all(client))


def statuses(raw: bytes) -> list[int]:
    return [int(part[:3]) for part in raw.split(b"HTTP/1.1 ")[1:]]


def refusal(raw: bytes) -> str:
    """The code of the only answer in `raw`, which has the shape of every refusal."""
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    code: str = error["code"]
    return code


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (GET + b"X-Big: " + b"a" * 70_000 + b"\r\n\r\n", 431, "head_too_large"),
        (GET + b"X-Endless: " + b"a" * 400_000, 431, "head_too_large"),
        (GET + b"a" * 400_000, 431, "head_too_large"),
        (
            GET + b"".join(b"X-%d: %b\r\n" % (i, b"a" * 1000) for i in range(80)) + b"\r\n",
            431,
            "head_too_large",
        ),
        (GET + b"".join(b"X-%d: a\r\n" % i for i in range(120)) + b"\r\n", 431, "head_too_large"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "url_too_long"),
        (b"GET /?q=" + b"a" * 400_000, 414, "url_too_long"),
        (b"nonsense\r\n\r\n", 400, "invalid_request"),
        (GET + b"Content-Length: -1\r\n\r\n", 400, "invalid_request"),
        (GET * 2 + b"\r\n", 400, "invalid_request"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_a_head_over_the_bounds_is_refused_in_openais_shape(
    system: System, head: bytes, status: int, code: str
) -> None:
    with closing(connected(system)) as client:
        client.sendall(head)
        raw = read_all(client)
    assert statuses(raw) == [status]
    assert refusal(raw) == code


@pytest.mark.parametrize(
    "fields",
    [b"X-Big: " + b"a" * 60_000 + b"\r\n", b"".join(b"X-%d: a\r\n" % i for i in range(98))],
)
@pytest.mark.parametrize("piece", [1000, 1 << 20])
def test_a_head_within_the_bounds_is_taken_however_it_comes(
    system: System, fields: bytes, piece: int
) -> None:
    request = GET + fields + b"Connection: close\r\n\r\n"
    with closing(connected(system)) as client:
        for start in range(0, len(request), piece):
            client.sendall(request[start : start + piece])
        assert statuses(read_all(client)) == [200]


def test_a_trailer_without_end_is_refused(system: System) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with closing(connected(system)) as client:
        client.sendall(head + b"0\r\nX-Trailer: ")
        assert client.recv(65536).startswith(b"HTTP/1.1 401")
        client.sendall(b"a" * 400_000)
        assert statuses(read_all(client)) == [431]


def test_requests_sent_ahead_are_answered_in_order_and_only_so_many(system: System) -> None:
    closing_ = GET + b"Connection: close\r\n\r\n"
    missing = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"
    assert answered(system, GET + b"\r\n" + missing + closing_) == [200, 404, 200]
    body = b'{"a": "' + b"x" * 100_000 + b'"}'  # a body longer than a slice of what is fed to the parser
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert answered(system, post + missing + closing_) == [401, 404, 200]
    with closing(connected(system)) as client:
        client.sendall((GET + b"\r\n") * 10_000)
        with suppress(ConnectionResetError):
            assert len(statuses(read_all(client))) <= connection.MAX_PIPELINED + 2


def test_a_head_that_does_not_arrive_ends_its_connection(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with closing(connected(system)) as silent, closing(connected(system)) as slow:
        slow.sendall(GET + b"X-A")
        for _ in range(3):
            time.sleep(0.05)
            slow.sendall(b"a")
        assert refusal(read_all(slow)) == "head_timeout"
        assert read_all(silent) == b""
    with closing(connected(system)) as again:  # also after a request, and after a body that nobody read
        again.sendall(GET + b"\r\n")
        assert again.recv(65536).startswith(b"HTTP/1.1 200")
        again.sendall(b"\r\n")
        read_all(again)
    with closing(connected(system)) as unread:
        unread.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert unread.recv(65536).startswith(b"HTTP/1.1 401")
        unread.sendall(b"{")
        assert statuses(read_all(unread)) == []


@pytest.fixture(scope="module")
def narrow(valkey_url: str) -> Iterator[System]:
    """A system with room for three connections."""
    with started(valkey_url, max_connections=3) as it:
        yield it


def test_of_too_many_connections_the_longest_idle_makes_way(narrow: System) -> None:
    with closing(connected(narrow)) as first, closing(connected(narrow)) as second:
        time.sleep(0.05)
        with closing(connected(narrow)), closing(connected(narrow)):
            assert read_all(first) == b""
            second.sendall(GET + b"Connection: close\r\n\r\n")
            assert statuses(read_all(second)) == [200]


def test_busy_connections_stay_and_the_one_too_many_is_told(narrow: System) -> None:
    narrow.engine.behaviour.step_seconds = 0.1
    body = json.dumps({"model": "toy", "prompt": "x", "max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {narrow.operator}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    busy = [connected(narrow) for _ in range(3)]
    try:
        for client in busy:
            client.sendall(request)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        with closing(connected(narrow)) as late:
            assert refusal(read_all(late)) == "unavailable"
        assert all(b"data: " in client.recv(65536) for client in busy)
    finally:
        for client in busy:
            client.close()
    until(lambda: narrow.engine.running == 0)
    assert httpx.get(f"{narrow.url}/healthz").status_code == 200


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's end of a connection holds little of what is sent: a client that does not read is felt."""
    made = connection.Connection.connection_made

    def connection_made(self: connection.Connection, transport: asyncio.Transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", connection_made)


def stalled(system: System, key: str, seconds: float) -> socket.socket:
    """A client that asked for a stream of large events, and never reads."""
    client = connected(system)
    asked = {"model": "toy", "prompt": "x", "max_tokens": 200, "n": 8, "logprobs": 20, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    head += f"X-Request-Timeout: {seconds:g}\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


@pytest.mark.usefixtures("small_buffers")
def test_rows_end_at_their_deadline_though_nobody_reads(
    system: System, key: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.http.streaming.GRACE_SECONDS", 0.2)
    rows = system.app.state.services.engine
    with closing(stalled(system, key, 1.0)) as client:
        until(lambda: rows.rows > 0)
        until(lambda: rows.rows == 0)
        assert b"data: [DONE]" not in read_all(client)


@pytest.mark.usefixtures("small_buffers")
def test_a_client_that_reads_nothing_for_long_is_given_up(
    system: System, key: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.3)
    rows = system.app.state.services.engine
    with closing(stalled(system, key, 500.0)) as client:
        until(lambda: rows.rows > 0)
        until(lambda: rows.rows == 0)
        assert b"data: [DONE]" not in read_all(client)


@pytest.mark.usefixtures("small_buffers")
def test_a_client_that_reads_slowly_gets_it_all(
    system: System, key: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SEND_SECONDS", 0.5)
    with closing(stalled(system, key, 500.0)) as client:
        raw = b""
        while not raw.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            raw += client.recv(8192)
            time.sleep(0.002)
