"""The ledger of usage against what the engine itself counts, on a real server."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx

from server.usage.record import Amounts
from tests.e2e.serving import Serving, ask, push
from tests.waiting import until

ENGINES = {
    "generated_tokens": "vllm:generation_tokens_total",
    "computed": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
    "loads": "polypeft_adapter_load_seconds_count",
    "load_bytes": "polypeft_adapter_load_bytes_total",
}


class Counts(NamedTuple):
    ledger: dict[str, float]
    engine: dict[str, float]


def sums(server: Serving) -> dict[str, float]:
    """Of all tenants, today and yesterday."""
    with server.http(server.operator) as http:
        answer = http.get("/admin/usage", params={"start": str(int(time.time()) - 86_400)})
    assert answer.status_code == 200, answer.text
    total = dict.fromkeys((name.replace("_ms", "_seconds") for name in Amounts._fields), 0.0)
    for bucket in answer.json()["data"]:
        for result in bucket["results"]:
            total = {name: amount + result[name] for name, amount in total.items()}
    return total | {"computed": total["prompt_tokens"] - total["cached_tokens"]}


def engines(server: Serving) -> dict[str, float]:
    return {name: server.gauge(metric) for name, metric in ENGINES.items()}


def test_the_sums_are_the_engines_own_counts(
    serving: Serving, http: httpx.Client, lora: Callable[[int], Path]
) -> None:
    """No row ends by a stop string or an end-of-text token, none is cancelled, and no trial is among them."""
    start = _settled(serving)
    for seed in range(3):
        push(http, f"usage-{seed}", lora(seed))
    trials = _settled(serving)
    prompt = "A prompt that is long enough for several blocks of the prefix cache. " * 4
    for seed in (0, 1, 2, 0, 1, 2):
        ask(http, f"usage-{seed}", prompt, 9)
    for _ in range(2):
        ask(http, "llama", prompt, 9)
    end = _settled(serving)
    for name in ("generated_tokens", "computed", "cached_tokens"):
        assert end.ledger[name] - trials.ledger[name] == end.engine[name] - trials.engine[name] > 0, name
    for name in ("loads", "load_bytes"):
        assert end.ledger[name] - start.ledger[name] == end.engine[name] - start.engine[name] > 0, name
    [own] = [r for bucket in http.get("/v1/usage").json()["data"] for r in bucket["results"]]
    assert (own["num_model_requests"], own["output_tokens"]) == (8, 72)
    assert own["input_cached_tokens"] == end.ledger["cached_tokens"] - trials.ledger["cached_tokens"]


def _settled(server: Serving) -> Counts:
    """Once what came before is in the sums and in the engine's counts."""
    seen: list[Counts] = []

    def same() -> bool:
        if server.gauge("vllm:num_requests_running"):
            return False
        seen.append(Counts(sums(server), engines(server)))
        time.sleep(2.5)  # the engine reports once a second, and leftovers are taken every two
        return len(seen) > 1 and seen[-1] == seen[-2]

    until(same, lambda: f"they go on changing: {seen}", 120)
    return seen[-1]
