"""What only the real engine can refuse or survive: hostile weights, extreme sampling, load, lost clients."""

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import Serving, ask, body, files_of, push
from tests.fixtures.models import build_tiny, make_lora
from tests.waiting import until

PROMPT = "What is the capital of France?"
CONTEXT = 512
SEED = random.SystemRandom().randrange(2**32)
Lora = Callable[[int], Path]
Golden = Callable[..., str]


@pytest.fixture(autouse=True)
def _base_is_unharmed(serving: Serving, golden: Golden) -> Iterator[None]:
    """After each of these tests the base answers as before, also over blocks that were used meanwhile."""
    yield
    with serving.http(serving.tenant("control")) as client:
        assert ask(client, "llama", PROMPT) == golden(None, PROMPT)


def changed(folder: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of an adapter with each tensor changed."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = target / "adapter_model.safetensors"
    save_file({name: change(name, t) for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    return target


def configured(folder: Path, target: Path, **fields: Any) -> Path:
    changed(folder, target, lambda _name, tensor: tensor)
    config = target / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return target


def refused(http: httpx.Client, folder: Path) -> str:
    """The sentence with which an upload is turned down; nothing of it can be seen after."""
    answer = http.post("/v1/adapters", data={"name": "bad"}, files=files_of(folder))
    assert answer.status_code == 400, answer.text
    assert http.get("/v1/adapters").json()["data"] == []
    assert http.post("/v1/completions", json=body("bad", PROMPT)).status_code == 404
    message: str = answer.json()["error"]["message"]
    assert "/" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(
    http: httpx.Client, lora: Lora, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(dtype)
        if "layers.1" in name and "v_proj.lora_B" in name:
            tensor[-1, -1] = value
        return tensor

    message = refused(http, changed(lora(0), tmp_path / "bad", spoil))
    assert "layers.1.self_attn.v_proj.lora_B" in message
    assert "NaN or Inf" in message


def test_an_embedding_that_came_along_must_be_the_bases_own(
    http: httpx.Client, tiny: Path, tmp_path: Path, golden: Golden
) -> None:
    folder = make_lora(tiny, tmp_path / "emb", seed=1, r=4, target_modules=["embed_tokens", "q_proj"])
    copies = [name for name in load_file(folder / "adapter_model.safetensors") if "base_layer" in name]
    assert copies, "PEFT saves the table along"

    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1e-3 if name in copies else tensor

    assert "embed_tokens" in refused(http, changed(folder, tmp_path / "bad", spoil))
    push(http, "good", folder)
    assert ask(http, "good", PROMPT) == golden(folder, PROMPT)


def test_an_adapter_of_another_base_is_refused(
    http: httpx.Client, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    other = make_lora(tiny_models("gpt2"), tmp_path / "gpt2", r=4, target_modules=["c_attn"])
    refused(http, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda good, bad: changed(good, bad, lambda _, t: torch.full_like(t, 3e38)),
        lambda good, bad: changed(good, bad, lambda _, t: t * 1e19),
        lambda good, bad: configured(good, bad, lora_alpha=1e308),
    ],
    ids=["largest", "large", "alpha"],
)
def test_finite_weights_that_overflow_at_once_are_refused(
    http: httpx.Client, lora: Lora, tmp_path: Path, make: Callable[[Path, Path], Path]
) -> None:
    refused(http, make(lora(2), tmp_path / "bad"))


def test_weights_that_overflow_at_one_token_end_their_own_rows_only(
    http: httpx.Client, lora: Lora, tiny: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """No trial at the upload can find it: all other tokens are served."""
    (trigger,) = tokenizer.encode("~")

    def arm(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "lora_embedding_A" in name:
            tensor[:, trigger] = 3e38
        return tensor * 10 if "lora_embedding_B" in name else tensor

    folder = make_lora(tiny, tmp_path / "emb", seed=1, r=4, target_modules=["embed_tokens"])
    push(http, "bad", changed(folder, tmp_path / "bad", arm))
    push(http, "good", lora(1))
    assert ask(http, "bad", PROMPT)
    rows = [(model, f"{i} {PROMPT}", 40) for i, model in enumerate(["good", "llama"] * 4)]
    alone = [ask(http, *row) for row in rows]
    for _ in range(3):
        with ThreadPoolExecutor(12) as pool:
            asked = [body("bad", f"{i} {PROMPT}~{PROMPT}", 40) for i in range(4)]
            spoilt = pool.map(lambda fields: http.post("/v1/completions", json=fields), asked)
            texts = pool.map(lambda row: ask(http, *row), rows)
        assert list(texts) == alone
        codes = [(answer.status_code, answer.json()["error"]["code"]) for answer in spoilt]
        assert codes == [(500, "non_finite_logits")] * 4
    streamed = http.post("/v1/completions", json=body("bad", PROMPT + "~", stream=True))
    assert streamed.status_code == 500


def test_weights_changed_under_an_adapters_feet_never_serve(tiny: Path, lora: Lora, tmp_path: Path) -> None:
    """The same data directory and the same model name, but another model: no adapter of it is this one's."""
    it = Serving(str(tiny), tmp_path, *OPTIONS)
    try:
        it.start()
        key = it.tenant("acme")
        with it.http(key) as http:
            push(http, "poet", lora(0))
        it.stop()
        build_tiny("llama", tmp_path / "other" / "llama", seed=1)
        it = Serving(str(tmp_path / "other" / "llama"), tmp_path, *OPTIONS)
        it.start()
        with it.http(key) as http:
            answer = http.post("/v1/completions", json=body("poet", PROMPT))
            assert answer.status_code == 400, answer.text
            assert "was made for the base" in answer.json()["error"]["message"]
            assert ask(http, "llama", PROMPT)
    finally:
        it.end()


def test_the_context_is_used_to_its_last_token_and_no_further(http: httpx.Client) -> None:
    def complete(length: int, tokens: int | None) -> httpx.Response:
        return http.post("/v1/completions", json=body("llama", [7] * length) | {"max_tokens": tokens})

    for length, tokens in ((CONTEXT - 1, 1), (CONTEXT - 100, 100), (1, CONTEXT - 1)):
        answer = complete(length, tokens).json()
        assert answer["usage"]["total_tokens"] == CONTEXT
        assert answer["choices"][0]["finish_reason"] == "length"
    refusals: list[tuple[int, int | None]] = [
        (CONTEXT, 1),
        (CONTEXT - 1, 2),
        (CONTEXT + 1, None),
        (5000, 1),
    ]
    for length, limit in refusals:
        refusal = complete(length, limit)
        message = refusal.json()["error"]["message"]
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert str(CONTEXT) in message
        assert str(length) in message
    chat = {"model": "llama", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert answer["usage"]["total_tokens"] == CONTEXT


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request_in_time_and_says_so(
    serving: Serving, http: httpx.Client, stream: bool
) -> None:
    asked = body("llama", PROMPT, 480, n=8, temperature=1, stream=stream)
    start = time.monotonic()
    answer = http.post("/v1/completions", json=asked, headers={"x-request-timeout": "0.3"})
    assert time.monotonic() - start < 30  # without a deadline it may take request_seconds, 600
    last = answer.text.strip().rsplit("data: ", 1)[-1]
    assert json.loads(last)["error"]["code"] == "deadline_exceeded"
    assert answer.status_code == 504 if not stream else answer.status_code in {200, 504}
    until(lambda: serving.gauge("vllm:num_requests_running") == 0)


def test_a_client_that_leaves_frees_what_it_held(serving: Serving, key: str, http: httpx.Client) -> None:
    """Not streamed: nothing has been written to it when it goes."""
    raw = json.dumps(body("llama", PROMPT, 480, n=8, temperature=1)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    host, port = serving.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + raw)
            time.sleep(0.2)
    until(lambda: serving.gauge("vllm:num_requests_running") == 0)
    assert serving.gauge("vllm:num_requests_waiting") == 0


def test_a_deleted_adapter_ends_its_streams_in_order(http: httpx.Client, lora: Lora) -> None:
    push(http, "poet", lora(3))
    whole = ask(http, "poet", PROMPT, 400)
    with http.stream("POST", "/v1/completions", json=body("poet", PROMPT, 400, stream=True)) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        found = [next(lines)]
        assert http.delete("/v1/adapters/poet").status_code == 200
        assert http.get("/v1/adapters/poet").status_code == 404
        assert http.post("/v1/completions", json=body("poet", PROMPT)).status_code == 404
        found += lines
    assert found[-1] == "[DONE]" or "error" in json.loads(found[-1])
    if found[-1] == "[DONE]":
        assert "".join(json.loads(line)["choices"][0]["text"] for line in found[:-1]) == whole
    again = push(http, "poet", lora(4))
    assert again["version"] == 2
    assert ask(http, "poet", PROMPT, 400) != whole


SCHEMAS: list[Any] = [
    {"enum": []},
    {"not": {}},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "minItems": 10**6},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"allOf": [{"type": "string"}, {"type": "number"}]},
    {"anyOf": [{"const": i} for i in range(2000)]},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(800)}},
    json.loads('{"items":' * 100 + "{}" + "}" * 100),
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:24])
def test_a_hostile_schema_is_answered_or_refused_and_harms_nobody(http: httpx.Client, schema: Any) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"model": "llama", "messages": [{"role": "user", "content": "x"}], "max_tokens": 12}
    answer = http.post("/v1/chat/completions", content=json.dumps(asked | {"response_format": format_}))
    assert answer.status_code in {200, 400}, answer.text
    assert answer.elapsed.total_seconds() < 10


def test_any_sampling_within_the_limits_is_answered(http: httpx.Client, lora: Lora) -> None:
    """The ends of every range, mixed at random: each row ends, and no logprob is NaN."""
    push(http, "poet", lora(5))
    ends: dict[str, list[Any]] = {
        "temperature": [0, 1e-300, 1e-6, 1, 2],
        "top_p": [1e-300, 0.5, 1],
        "top_k": [-1, 0, 1, 2**31 - 1],
        "min_p": [0, 1e-300, 1],
        "presence_penalty": [-2, 0, 2],
        "frequency_penalty": [-2, 0, 2],
        "repetition_penalty": [1e-300, 1, 10],
        "logit_bias": [{}, {"5": 100, "6": -100}, {str(i): -100 for i in range(300)}],
        "seed": [None, 0, -(2**63), 2**63 - 1],
        "n": [1, 3],
        "logprobs": [None, 0, 20],
        "min_tokens": [0, 6],
        "stop_token_ids": [[], [0, 5, 6]],
        "stop": [[], ["e", "😀"]],
        "ignore_eos": [False, True],
    }
    chance = random.Random(SEED)
    asked = [
        {field: chance.choice(values) for field, values in ends.items()}
        | {"model": chance.choice(["llama", "poet"]), "prompt": PROMPT, "max_tokens": 6}
        for _ in range(80)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda fields: http.post("/v1/completions", json=fields), asked))
    for fields, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, (SEED, fields, answer.text)
        choices = answer.json()["choices"]
        assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
        for choice in choices:
            scores = choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
            assert all(score is not None and score <= 0 for score in scores), (SEED, fields, scores)


@pytest.mark.anyio
async def test_under_ten_times_the_load_health_answers_and_what_is_accepted_completes(
    serving: Serving, key: str, http: httpx.Client, golden: Golden
) -> None:
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=serving.url, headers=headers, timeout=60, limits=limits) as client:
        flood = [
            asyncio.create_task(client.post("/v1/completions", json=body("llama", PROMPT)))
            for _ in range(400)
        ]
        beside = 0  # answers to /healthz while the flood was on
        while not all(task.done() for task in flood):
            assert (await client.get("/healthz")).status_code == 200
            beside += 1
            await asyncio.sleep(0.02)
    answers = [task.result() for task in flood]
    refused = [answer for answer in answers if answer.status_code != 200]
    # past the tenant's limit, past the server's
    assert {answer.status_code for answer in refused} <= {429, 503}
    texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
    assert texts == {golden(None, PROMPT)}
    assert len(answers) - len(refused) >= 256
    assert all(answer.headers["retry-after"] for answer in refused)
    assert beside > 0


def test_metrics_name_nobody_and_quote_nothing(
    serving: Serving, key: str, http: httpx.Client, lora: Lora
) -> None:
    made = push(http, "very-private-name", lora(6))
    ask(http, "very-private-name", "my very private prompt")
    tenants = serving.get("/admin/tenants", serving.operator).json()["data"]
    text = serving.get("/metrics").text
    for secret in (key, serving.operator, "private", made["digest"][:12], *(t["id"] for t in tenants)):
        assert secret not in text
        assert secret not in serving.log()
