"""Rows of many adapters and of the base in one batch: each gets the tokens it gets alone."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Serving, ask, body, push
from tests.waiting import until

SEED = random.SystemRandom().randrange(2**32)
TEXT = "One frozen base model stays resident. Thousands of tenants bring small adapters. "
Lora = Callable[[int], Path]

pytestmark = pytest.mark.anyio


def prompt(i: int) -> str:
    """Of its own for each row, 1 to 100 tokens long."""
    return f"{i} {TEXT * 2}"[: 3 + (37 * i) % 160]


@asynccontextmanager
async def crowd(serving: Serving, key: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=serving.url, headers=headers, timeout=90, limits=limits) as client:
        yield client


async def text_of(client: httpx.AsyncClient, asked: dict[str, Any]) -> str:
    answer = await client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


async def test_sixteen_adapters_and_the_base_in_one_batch(
    serving: Serving, lora: Lora, golden: Callable[..., str]
) -> None:
    """Cold, then alone, then with every prompt in the prefix cache."""
    keys = [serving.tenant("even"), serving.tenant("odd")]
    rows = [(f"a{i}" if i < 16 else "llama", i) for i in range(20)]
    for i in range(16):
        with serving.http(keys[i % 2]) as client:
            push(client, f"a{i}", lora(i))
    before = wide_steps(serving)
    async with crowd(serving, keys[0]) as even, crowd(serving, keys[1]) as odd:

        async def together() -> list[str]:
            return await asyncio.gather(
                *(text_of((even, odd)[i % 2], body(model, prompt(i), 48)) for model, i in rows)
            )

        cold = await together()
        alone = [await text_of((even, odd)[i % 2], body(model, prompt(i), 48)) for model, i in rows]
        assert cold == alone
        assert await together() == alone
    until(lambda: wide_steps(serving) > before)  # the figures come once a second
    for i in (0, 7, 14, 19):
        assert alone[i] == golden(lora(i) if i < 16 else None, prompt(i), 48)


def wide_steps(serving: Serving) -> float:
    """Steps so far that had more than 8 rows."""
    lines = dict(line.rsplit(" ", 1) for line in serving.get("/metrics").text.splitlines())
    return float(lines["polypeft_batch_rows_count"]) - float(lines['polypeft_batch_rows_bucket{le="8.0"}'])


async def test_32_adapters_on_4_slots_while_clients_hang_up(mortal: Serving, lora: Lora) -> None:
    chance = random.Random(SEED)
    key = mortal.tenant("crowd")
    models = [*(f"a{i}" for i in range(32)), "llama"]
    with mortal.http(key) as client:
        for i in range(32):
            push(client, f"a{i}", lora(i))
        alone = {model: ask(client, model, prompt(i), 24) for i, model in enumerate(models)}

    async def one(client: httpx.AsyncClient, i: int, leaves: int | None) -> str | None:
        """A row's text, or None when its client left after so many lines of the stream."""
        asked = body(models[i], prompt(i), 24, stream=leaves is not None)
        async with gate:
            if leaves is None:
                return await text_of(client, asked)
            async with client.stream("POST", "/v1/completions", json=asked) as answer:
                async for _line in answer.aiter_lines():
                    if leaves == 0:
                        break
                    leaves -= 1
        return None

    gate = asyncio.Semaphore(24)
    asked = [i for _ in range(4) for i in chance.sample(range(len(models)), len(models))]
    leavers = [chance.randrange(12) if chance.random() < 0.3 else None for _ in asked]
    async with crowd(mortal, key) as all_:
        texts = await asyncio.gather(*(one(all_, i, n) for i, n in zip(asked, leavers, strict=True)))
    wrong = [models[i] for i, text in zip(asked, texts, strict=True) if text not in {None, alone[models[i]]}]
    assert not wrong, f"seed {SEED}"
    assert texts.count(None) == len(leavers) - leavers.count(None) > 20
    until(lambda: mortal.gauge("vllm:num_requests_running") == 0, lambda: f"seed {SEED}")
    assert mortal.gauge("polypeft_adapter_cache_evictions_total") > 32
    with mortal.http(key) as client:
        for i in (0, 13, 32):
            assert ask(client, models[i], prompt(i), 24) == alone[models[i]]
