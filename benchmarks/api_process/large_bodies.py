"""What one request costs the others: bodies of every shape, as large as are sent, beside streams.

    python -m benchmarks.api_process.large_bodies                    # about two minutes

A real `polypeft serve` with SmolLM2-135M, and streams that go on all the while. Bodies are sent one after the
other, each several times: just under the cap of a body, and over it. `loop`: what one of them takes of the
API's event loop, in CPU time of its thread, so it is the same on a busy machine. `health`: how long GET
/healthz takes meanwhile; `none` is without any body.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.arms import quiet
from server.base_model.default_model import ensure_default_model
from tests.e2e.serving import Serving, body

CACHE = Path(__file__).resolve().parents[2] / ".cache"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PAUSE_SECONDS = 0.01  # between two looks at /healthz


def crowded(unit: str, size: int) -> str:
    """A JSON list of about `size` bytes."""
    return "[" + ",".join([unit] * (size // (len(unit) + 1))) + "]"


def shapes(model: str, size: int) -> dict[str, tuple[str, str]]:
    """Route and body by name, each of about `size` bytes."""

    def completion(prompt: str, more: str = "") -> tuple[str, str]:
        return COMPLETIONS, f'{{"model": "{model}", "max_tokens": 1, "prompt": {prompt}{more}}}'

    def chat(messages: str, more: str = "") -> tuple[str, str]:
        return CHAT, f'{{"model": "{model}", "max_tokens": 1, "messages": {messages}{more}}}'

    message, part = '{"role":"user","content":"a"}', '{"type":"text","text":"a"}'
    keys = ",".join(f'"k{i}":1' for i in range(size // 12))
    deep = '{"a":' * (size // 6) + "1" + "}" * (size // 6)
    schema = '{"type":"json_schema","json_schema":{"name":"x","schema":%s}}'
    enum = f'{{"enum": {crowded("1", size)}}}'
    one = f"[{message}]"
    return {
        "words": completion(json.dumps("a " * (size // 2))),
        "one word": completion(json.dumps("a" * size)),
        "escapes": completion('"' + "\\u00e9" * (size // 6) + '"'),
        "token ids": completion(crowded("1", size)),
        "lists": completion(crowded("[]", size)),
        "objects": completion(crowded('{"a":1}', size)),
        "texts": completion(crowded('""', size)),
        "messages": chat(crowded(message, size)),
        "parts": chat('[{"role":"user","content":' + crowded(part, size) + "}]"),
        "long message": chat(json.dumps([{"role": "user", "content": "a " * (size // 2)}])),
        "unknown fields": (COMPLETIONS, "{" + keys + "}"),
        "nested": (COMPLETIONS, deep),
        "metadata": completion('"x"', f', "metadata": {{{keys}}}'),
        "stops": completion('"x"', f', "stop": {crowded(json.dumps("a"), size)}'),
        "adapters": completion('"x"', f', "adapters": {crowded(json.dumps({"name": "a"}), size)}'),
        "long number": completion('"x"', f', "seed": {"9" * size}'),
        "schema": chat(one, f', "response_format": {schema % ("{" + keys + "}")}'),
        "enum": chat(one, f', "response_format": {schema % enum}'),
    }


@contextmanager
def streaming(http: httpx.Client, model: str, count: int) -> Iterator[None]:
    """`count` streams that go on, until the block ends."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.is_set():
            asked = body(model, "The sea is", 400, stream=True)
            with suppress(httpx.TransportError), http.stream("POST", COMPLETIONS, json=asked) as answer:
                for _ in answer.iter_lines():
                    if ended.is_set():
                        return

    threads = [threading.Thread(target=follow) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def loop_seconds(pid: int) -> float:
    """CPU time of the process's first thread, in which its event loop runs."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def measured(serving: Serving, pid: int, work: Callable[[], None]) -> tuple[float, list[float]]:
    """The loop's CPU time while `work` is done, and how long /healthz took beside it."""
    done, found = threading.Event(), list[float]()

    def look() -> None:
        with serving.http() as client:
            while not (found and done.is_set()):
                start = time.perf_counter()
                client.get("/healthz")
                found.append(time.perf_counter() - start)
                time.sleep(PAUSE_SECONDS)

    thread = threading.Thread(target=look)
    thread.start()
    start = loop_seconds(pid)
    work()
    cost = loop_seconds(pid) - start
    done.set()
    thread.join()
    return cost, found


def main(
    model: Annotated[Path | None, typer.Option(help="A model's folder.")] = None,
    sizes: Annotated[str, typer.Option(help="Of bodies, in MB.")] = "1,4",
    streams: Annotated[int, typer.Option(help="That go on meanwhile.")] = 4,
    repeats: Annotated[int, typer.Option(help="Of each body.")] = 5,
) -> None:
    quiet()
    folder = model or ensure_default_model(CACHE)
    table = Table("body", "status", "loop, ms each", "health p50, ms", "p99", "max")
    with (
        tempfile.TemporaryDirectory() as scratch,
        Serving(str(folder), Path(scratch), "--workers", "0") as it,
    ):
        key, pid = it.tenant("bodies"), it.pid("api")
        cases = {"none": ("", "")}
        for size in sizes.split(","):
            made = shapes(folder.name, int(float(size) * 1e6))
            cases |= {f"{size} MB: {name}": case for name, case in made.items()}
        with it.http(key) as http, streaming(http, folder.name, streams):
            for name, (url, raw) in track(cases.items(), console=Console(stderr=True)):
                statuses: set[Any] = set()

                def work(url: str = url, raw: str = raw, statuses: set[Any] = statuses) -> None:
                    for _ in range(repeats):
                        if url:
                            statuses.add(send(http, url, raw))
                        else:
                            time.sleep(0.5)

                cost, found = measured(it, pid, work)
                p50, p99 = np.percentile(found, (50, 99)) * 1e3
                row = (cost / repeats * 1e3, p50, p99, max(found) * 1e3)
                table.add_row(name, " ".join(map(str, statuses)), *(f"{value:.1f}" for value in row))
    Console().print(table)


def send(http: httpx.Client, url: str, raw: str) -> object:
    """The status, or what became of the connection: a body over the cap is not read to its end."""
    try:
        return http.post(url, content=raw, headers={"content-type": "application/json"}).status_code
    except httpx.TransportError as error:
        return type(error).__name__


if __name__ == "__main__":
    typer.run(main)
