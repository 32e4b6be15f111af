"""What tenants do to a server in a live test: everything that a panel shows, for so many seconds."""

import asyncio
import json
import time
from collections.abc import Awaitable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.serving import Serving, body, files_of

LONG = "One frozen base model stays resident. " * 6
GRAMMAR = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
AT_ONCE = 24  # more than one tenant may have in the test's server
CROWD = 64  # tenants with a row each: more than its queue and its batch hold
CROWDED = 4  # every so many turns they all ask at once
MANY = 400  # tokens: all rows of a batch begin, and its KV cannot hold them all to the end


def upload(server: Serving, key: str, name: str, folder: Path) -> int:
    with server.http(key) as client:
        return client.post("/v1/adapters", data={"name": name}, files=files_of(folder)).status_code


def train(server: Serving, key: str, base: str, name: str, epochs: int) -> None:
    """Begin a fine-tuning job."""
    turns = [("user", "{0} squared?"), ("assistant", "{1}.")]  # takes a while to learn by heart
    lines = ([{"role": role, "content": text.format(i, i * i)} for role, text in turns] for i in range(48))
    data = b"".join(json.dumps({"messages": line}).encode() + b"\n" for line in lines)
    with server.sdk(key) as sdk:
        file = sdk.files.create(file=("data.jsonl", data), purpose="fine-tune")
        hyper: Any = {"n_epochs": epochs, "batch_size": 8}
        sdk.fine_tuning.jobs.create(
            model=base,
            training_file=file.id,
            suffix=name,
            seed=1,
            method={"type": "supervised", "supervised": {"hyperparameters": hyper}},
            extra_body={"peft": {"type": "lora", "r": 4, "learning_rate": 0.001}},
        )


async def use(server: Serving, keys: dict[str, list[str]], base: str, seconds: float) -> None:
    """Every tenant (key -> its adapters) at once: short and long, streamed, wrong, cut off, too many."""
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=512)
    crowd = [server.tenant(f"crowd-{i}") for i in range(CROWD)]
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        turn = 0
        while turn < CROWDED or time.monotonic() < end:  # a slow machine has one crowded turn all the same
            turn += 1
            await asyncio.gather(
                *(_tenant(client, key, [base, *own], turn) for key, own in keys.items()),
                *(_one(client, key, base, turn) for key in crowd if turn % CROWDED == 0),
                return_exceptions=True,
            )


async def _tenant(client: httpx.AsyncClient, key: str, models: list[str], turn: int) -> None:
    headers = {"authorization": f"Bearer {key}"}

    def post(path: str, json: Any, **options: Any) -> Coroutine[Any, Any, httpx.Response]:
        return client.post(path, json=json, headers=headers, **options)

    model = models[turn % len(models)]
    chat = {"model": models[0], "messages": [{"role": "user", "content": "Say 3."}], "max_tokens": 4}
    calls: list[Awaitable[Any]] = [
        post("/v1/completions", body(model, LONG + str(turn % 3), 24)),
        post("/v1/completions", body(model, "n", 8, n=2, temperature=1)),
        post("/v1/completions", body(model, "stop", 40, ignore_eos=False, stop=["e", "a", "o"])),
        post("/v1/chat/completions", chat | {"response_format": GRAMMAR}),
        _streamed(client, headers, body(model, "stream", 32)),
        post("/v1/completions", body("nobody", "x", 1)),
        post("/v1/completions", {"model": model}),
        client.get("/v1/models", headers={"authorization": "Bearer wrong"}),
        client.get("/v1/adapters", headers=headers),
        _left(post("/v1/completions", body(model, "left", 300))),
    ]
    if turn % CROWDED == 0:
        calls += [post("/v1/completions", body(model, f"{i} at once", MANY)) for i in range(AT_ONCE)]
    await asyncio.gather(*calls, return_exceptions=True)


async def _one(client: httpx.AsyncClient, key: str, base: str, turn: int) -> None:
    asked = body(base, f"{turn} together", MANY)
    await client.post("/v1/completions", json=asked, headers={"authorization": f"Bearer {key}"})


async def _streamed(client: httpx.AsyncClient, headers: dict[str, str], asked: dict[str, Any]) -> None:
    given = asked | {"stream": True}
    async with client.stream("POST", "/v1/completions", json=given, headers=headers) as answer:
        async for _line in answer.aiter_lines():
            pass


async def _left(call: Coroutine[Any, Any, httpx.Response]) -> None:
    """A caller that does not wait for its answer."""
    task = asyncio.create_task(call)
    await asyncio.sleep(0.15)
    task.cancel()
