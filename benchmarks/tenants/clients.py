"""Clients of a running server, in one event loop: what they ask, what they get, and when."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx
import numpy as np

from tests.e2e.serving import body

LONGEST_SECONDS = 300.0
PAUSE_SECONDS = 0.5  # after a refusal


@dataclass(frozen=True)
class Profile:
    """What a tenant's clients send: streams of exactly `tokens` tokens, on prompts that no cache knows."""

    prompt_tokens: int = 24
    tokens: int = 48
    n: int = 1
    models: Sequence[str] = ("",)  # "": the base
    hang_up: float = 0.0  # share of requests whose client hangs up after three events

    def request(self, base: str, number: int, rng: Random) -> dict[str, Any]:
        prompt = [1000 + rng.randrange(20_000) for _ in range(self.prompt_tokens)]
        model = self.models[number % len(self.models)] or base
        return body(model, prompt, self.tokens, stream=True, n=self.n)


@dataclass
class Answer:
    """One request; times are time.perf_counter()."""

    sent: float
    status: int = 0
    code: str = ""  # of the error
    tokens: list[float] = field(default_factory=list)  # when each came
    done: bool = False
    ended: float = 0.0

    @property
    def first(self) -> float | None:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent if self.tokens else None


@asynccontextmanager
async def connected(url: str, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=LONGEST_SECONDS, limits=limits
    ) as http:
        yield http


async def ask(
    http: httpx.AsyncClient,
    request: dict[str, Any],
    *,
    events: int | None = None,
    deadline: float | None = None,
) -> Answer:
    """Send a request and read its stream, or hang up after so many `events`; `deadline` is in seconds."""
    headers = {} if deadline is None else {"x-request-timeout": f"{deadline:g}"}
    answer = Answer(time.perf_counter())
    try:
        async with http.stream("POST", "/v1/completions", json=request, headers=headers) as response:
            answer.status = response.status_code
            if not response.is_success:
                await response.aread()
                answer.code = response.json()["error"]["code"]
            else:
                await _read(response, answer, events)
    except httpx.TransportError as error:
        answer.code = type(error).__name__
    answer.ended = time.perf_counter()
    return answer


async def _read(response: httpx.Response, answer: Answer, events: int | None) -> None:
    async for line in response.aiter_lines():
        if line.startswith('data: {"error"'):
            answer.code = "stream"
        elif line == "data: [DONE]":
            answer.done = True
        elif line.startswith("data: {"):
            answer.tokens.append(time.perf_counter())
        if events is not None and len(answer.tokens) >= events:
            return


async def keep_asking(
    http: httpx.AsyncClient, base: str, profile: Profile, until: float, seed: int
) -> list[Answer]:
    """One client: sends its next request when the last one has ended, a little later if it was refused."""
    rng, answers = Random(seed), list[Answer]()
    for number in itertools.count(seed):
        if time.perf_counter() >= until:
            return answers
        events = 3 if rng.random() < profile.hang_up else None
        answers.append(await ask(http, profile.request(base, number, rng), events=events))
        if not answers[-1].tokens:
            await asyncio.sleep(PAUSE_SECONDS)
    return answers


async def crowd(
    url: str, base: str, groups: Sequence[tuple[str, Profile, int]], seconds: float
) -> list[list[Answer]]:
    """The answers of each group, which is a tenant's key, what its clients send, and how many there are.

    They stop sending after `seconds`; what they have sent is read to its end.
    """

    async def group(key: str, profile: Profile, count: int, seed: int) -> list[Answer]:
        async with connected(url, key) as http:
            loops = (keep_asking(http, base, profile, until, seed + i) for i in range(count))
            return [answer for answers in await asyncio.gather(*loops) for answer in answers]

    until = time.perf_counter() + seconds
    return list(
        await asyncio.gather(*(group(*given, seed=10_000 * number) for number, given in enumerate(groups)))
    )


def tokens_between(answers: Sequence[Answer], start: float, end: float) -> int:
    return sum(start <= at < end for answer in answers for at in answer.tokens)


def first_token(answers: Sequence[Answer], q: float) -> float:
    """A percentile of the seconds to first tokens."""
    return float(np.percentile([answer.first for answer in answers if answer.first is not None], q))
