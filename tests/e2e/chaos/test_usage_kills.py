"""Every request that a client saw answered is in the ledger of usage, once, whatever is killed meanwhile.

Clients add up what the server told them; at the end the ledger is compared, token by token.

USAGE_KILLS is how many kills of each process, USAGE_SEED when and of what; a failed run prints its seed.
"""

import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.usage.journal import leftovers
from tests.e2e.serving import Serving, body, push
from tests.waiting import until

SEED = int(os.environ.get("USAGE_SEED", random.SystemRandom().randrange(2**32)))
KILLS = int(os.environ.get("USAGE_KILLS", "1"))
CLIENTS = 3
VICTIMS = ("api", "engine", "valkey", "supervisor")
TRY_AGAIN = {500, 502, 503, 504}
PROMPT = "What is the capital of France? "
Amount = Counter[str]
log = logging.getLogger(__name__)


class Client:
    """Sends requests of all kinds, and adds up what it was told, by adapter."""

    def __init__(self, server: Serving, number: int, lora: Path) -> None:
        self.chance = random.Random(SEED + number)
        self.server = server
        self.key = server.tenant(f"usage-{SEED}-{number}")
        with server.http(self.key) as http:
            push(http, "poet", lora)
        self.told: dict[str, Amount] = {"llama": Counter(), "poet@1": Counter()}
        self.cut = 0  # requests whose answer did not come, or not to its end
        self.most_of_cut = 0  # tokens that these may have made

    def work(self, over: threading.Event) -> None:
        while not over.is_set():
            model = self.chance.choice([*self.told])
            tokens = self.chance.choice([1, 8, 8, 60])
            prompt = PROMPT * self.chance.randint(1, 6)
            fields: dict[str, Any] = {"n": self.chance.choice([1, 1, 2])}
            stream = self.chance.random() < 0.5
            if stream:
                fields |= {"stream": True, "stream_options": {"include_usage": True}}
            asked = body(model, prompt, tokens, **fields)
            try:
                usage = self.stream(asked) if stream else self.whole(asked)
            except httpx.TransportError:
                usage = None
            if usage is None:
                self.cut += 1
                self.most_of_cut += tokens * fields["n"]
                time.sleep(0.05)
            else:
                amounts = Counter(requests=1, prompt_tokens=usage["prompt_tokens"])
                amounts["generated_tokens"] = usage["completion_tokens"]
                amounts["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
                self.told[model].update(amounts)

    def whole(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        with self.server.http(self.key) as http:
            answer = http.post("/v1/completions", json=asked)
        assert answer.status_code in TRY_AGAIN | {200}, answer.text
        return answer.json()["usage"] if answer.status_code == httpx.codes.OK else None

    def stream(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        usage = None
        with self.server.http(self.key) as http, http.stream("POST", "/v1/completions", json=asked) as lines:
            assert lines.status_code in TRY_AGAIN | {200}
            for line in lines.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    return usage
                if data.startswith("{"):
                    usage = json.loads(data).get("usage") or usage
        return None

    def ledger(self) -> dict[str, Amount]:
        """By adapter; requests are those that were answered whole."""
        with self.server.http(self.key) as http:
            answer = http.get("/v1/usage", params={"group_by": "adapter"})
        assert answer.status_code == 200, answer.text
        found: dict[str, Amount] = {}
        for bucket in answer.json()["data"]:
            for result in bucket["results"]:
                found.setdefault(result["model"], Counter()).update({name: result[name] for name in AMOUNTS})
        return found


AMOUNTS = (
    "requests",
    "failed_requests",
    "cancelled_requests",
    "prompt_tokens",
    "cached_tokens",
    "generated_tokens",
)


def kill(server: Serving, victim: str) -> None:
    if victim == "supervisor":
        server.process.kill()
        server.process.wait(60)
        server.start()
    else:
        server.kill(victim)


@pytest.mark.timeout(max(600, 60 * KILLS * len(VICTIMS)))
def test_the_ledger_is_what_the_clients_were_told(mortal: Serving, lora: Callable[[int], Path]) -> None:
    chance = random.Random(SEED)
    kills = [*VICTIMS] * KILLS
    chance.shuffle(kills)
    over = threading.Event()
    clients = [Client(mortal, number, lora(0)) for number in range(CLIENTS)]
    with ThreadPoolExecutor() as pool:
        working = [pool.submit(client.work, over) for client in clients]
        try:
            for victim in kills:
                enough = _answered(clients) + 5
                until(lambda: _answered(clients) > enough or _stopped(working), mortal.log, 120)  # noqa: B023
                time.sleep(chance.uniform(0, 0.5))
                kill(mortal, victim)
                until(mortal.ready, mortal.log, 120)
        finally:
            over.set()
    for work in working:
        assert work.exception() is None, (f"seed {SEED}", work.exception())
    until(mortal.ready, mortal.log, 120)
    until(lambda: not _left(mortal), mortal.log, 120)
    told = [client.told for client in clients]
    log.warning("seed %d, kills %s: %s, %s cut", SEED, Counter(kills), told, [c.cut for c in clients])
    for client in clients:
        compare(client)


def _answered(clients: list[Client]) -> int:
    return sum(told["requests"] for client in clients for told in client.told.values())


def _stopped(working: list[Any]) -> bool:
    return any(work.done() for work in working)  # with an error, which is told below


def _left(server: Serving) -> int:
    """Journals that nobody holds, and that no process has added yet."""
    found = 0
    for leftover in leftovers(server.data_dir / "usage"):
        with leftover:
            found += 1
    return found


def compare(client: Client) -> None:
    """Whole answers are in it to the token; of those that were cut, no more than they could make."""
    found = client.ledger()
    extra: Amount = Counter()
    for model, told in client.told.items():
        sums = found.get(model, Counter())
        whole = sums["requests"] - sums["failed_requests"] - sums["cancelled_requests"]
        assert whole >= told["requests"], f"seed {SEED}: {model} lacks requests: {sums} {told}"
        assert whole - told["requests"] <= client.cut, f"seed {SEED}: {model} has too many: {sums} {told}"
        extra.update({name: sums[name] - told[name] for name in AMOUNTS})
    assert all(amount >= 0 for amount in extra.values()), f"seed {SEED}: {extra}"
    assert extra["requests"] <= client.cut, f"seed {SEED}: {extra}, {client.cut} were cut"
    assert extra["generated_tokens"] <= client.most_of_cut, f"seed {SEED}: {extra}"
