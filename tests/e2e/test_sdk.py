"""Every route we have through the `openai` SDK, with a tenant's key, over the real engine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from tests.e2e.serving import Serving, ask, push

PROMPT = "What is the capital of France?"
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
GREEDY: Any = {"temperature": 0, "extra_body": {"ignore_eos": True}}
Golden = Callable[..., str]
Lora = Callable[[int], Path]


@pytest.fixture
def sdk(serving: Serving, key: str) -> Iterator[openai.OpenAI]:
    with serving.sdk(key) as client:
        yield client


@pytest.fixture
def poet(http: httpx.Client, lora: Lora) -> dict[str, Any]:
    return push(http, "poet", lora(0))


def complete(sdk: openai.OpenAI, model: str, prompt: str | list[int] = PROMPT, **fields: Any) -> Any:
    return sdk.completions.create(model=model, prompt=prompt, **(GREEDY | {"max_tokens": 16} | fields))


def test_models_are_listed_retrieved_and_deleted(sdk: openai.OpenAI, poet: dict[str, Any]) -> None:
    models = {model.id: model for model in sdk.models.list()}
    assert sorted(models) == ["llama", "poet"]
    retrieved: Any = sdk.models.retrieve("poet")
    assert (retrieved.parent, retrieved.root) == ("llama", "poet@1")
    assert sdk.models.delete("poet").deleted
    for call in (sdk.models.retrieve, sdk.models.delete, lambda name: complete(sdk, name)):
        with pytest.raises(openai.NotFoundError) as refusal:
            call("poet")
        assert refusal.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError):
        sdk.models.delete("llama")


def test_base_and_adapter_answer_what_peft_answers(
    sdk: openai.OpenAI, poet: dict[str, Any], lora: Lora, golden: Golden
) -> None:
    base, adapted = complete(sdk, "llama"), complete(sdk, "poet")
    assert base.choices[0].text == golden(None, PROMPT)
    assert adapted.choices[0].text == golden(lora(0), PROMPT) != base.choices[0].text
    assert adapted.system_fingerprint == f"fp_{poet['digest'][:16]}" != base.system_fingerprint
    assert (adapted.model, adapted.usage.completion_tokens) == ("poet", 16)


@pytest.mark.parametrize("model", ["llama", "poet"])
def test_a_streams_text_is_the_text_and_its_usage_the_usage(
    sdk: openai.OpenAI, poet: dict[str, Any], model: str
) -> None:
    whole = complete(sdk, model, max_tokens=40)
    chunks = list(complete(sdk, model, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count("length") == 1
    assert chunks[-2].choices[0].finish_reason == "length"
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 40)
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


@pytest.mark.parametrize("model", ["llama", "poet"])
def test_chat_streamed_is_chat(sdk: openai.OpenAI, poet: dict[str, Any], model: str) -> None:
    given = GREEDY | {"model": model, "messages": CHAT, "max_completion_tokens": 24}
    whole = sdk.chat.completions.create(**given)
    deltas = list(sdk.chat.completions.create(**given, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in deltas)
    assert text == whole.choices[0].message.content != ""
    assert deltas[0].choices[0].delta.role == "assistant"
    assert deltas[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


@pytest.mark.anyio
async def test_the_async_client_agrees_with_the_sync_one(
    serving: Serving, key: str, sdk: openai.OpenAI, poet: dict[str, Any]
) -> None:
    async with serving.asdk(key) as asdk:
        given: Any = GREEDY | {"model": "poet", "messages": CHAT, "max_tokens": 12}
        streamed = [
            chunk.choices[0].delta.content or ""
            async for chunk in await asdk.chat.completions.create(**given, stream=True)
        ]
        whole = await asdk.chat.completions.create(**given)
        plain = await asdk.completions.create(model="poet", prompt=PROMPT, max_tokens=16, **GREEDY)
        assert [model.id async for model in asdk.models.list()] == ["llama", "poet"]
        async with asdk.chat.completions.stream(**given) as stream:
            helped = [event.delta async for event in stream if event.type == "content.delta"]
    assert "".join(streamed) == "".join(helped) == whole.choices[0].message.content
    assert plain.choices[0].text == complete(sdk, "poet").choices[0].text


def test_choices_share_a_prompt_and_differ_by_seed(sdk: openai.OpenAI) -> None:
    given: Any = {"model": "llama", "messages": CHAT, "n": 4, "seed": 7, "max_tokens": 12}
    first, again = (sdk.chat.completions.create(**given) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts == [choice.message.content for choice in again.choices]
    assert first.usage is not None
    assert again.usage is not None
    assert first.usage.prompt_tokens == again.usage.prompt_tokens


def test_several_prompts_are_each_answered_as_alone(sdk: openai.OpenAI, poet: dict[str, Any]) -> None:
    prompts = ["One frozen base", "Thousands of tenants", PROMPT]
    together = complete(sdk, "poet", prompts)  # type: ignore[arg-type]
    alone = [complete(sdk, "poet", prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_a_stop_string_cuts_the_text_before_it(sdk: openai.OpenAI) -> None:
    whole = complete(sdk, "llama", max_tokens=40).choices[0].text
    stop = whole[9:12]
    cut = complete(sdk, "llama", max_tokens=40, stop=["never there", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = complete(sdk, "llama", max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_logprobs_are_of_the_tokens_chosen(sdk: openai.OpenAI, poet: dict[str, Any]) -> None:
    chat = sdk.chat.completions.create(
        model="poet", messages=CHAT, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 8
    for token in logprobs.content:
        assert [other.logprob for other in token.top_logprobs] == sorted(
            (other.logprob for other in token.top_logprobs), reverse=True
        )
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy
    plain = complete(sdk, "poet", logprobs=2).choices[0]
    assert len(plain.logprobs.token_logprobs) == len(plain.logprobs.tokens) == 16
    assert all(max(top.values()) <= 0 for top in plain.logprobs.top_logprobs)


@pytest.mark.parametrize("model", ["llama", "poet"])
def test_a_prompt_is_scored_as_it_would_be_generated(
    sdk: openai.OpenAI, poet: dict[str, Any], tokenizer: PreTrainedTokenizerFast, model: str
) -> None:
    """By its text and by its token ids, in the completions' lists and in vLLM's."""
    written = complete(sdk, model, logprobs=1, echo=True).choices[0]
    ids = tokenizer.encode(PROMPT)
    given: Any = {"max_tokens": 0, "echo": True, "logprobs": 1, "extra_body": {"prompt_logprobs": 1}}
    for prompt in (PROMPT, ids):
        scored = complete(sdk, model, prompt, **given).choices[0]
        assert scored.text == PROMPT
        assert scored.logprobs.tokens == written.logprobs.tokens[: len(ids)]
        assert scored.logprobs.token_logprobs[0] is None
        assert scored.logprobs.token_logprobs[1:] == pytest.approx(
            written.logprobs.token_logprobs[1 : len(ids)], abs=1e-4
        )
        vllm = [
            score[str(token)]["logprob"]
            for token, score in zip(ids, scored.prompt_logprobs, strict=True)
            if score
        ]
        assert vllm == scored.logprobs.token_logprobs[1:]
    assert len(written.logprobs.tokens) == len(ids) + 16
    assert written.logprobs.text_offset[len(ids)] == len(PROMPT)


def test_an_answer_follows_its_json_schema(sdk: openai.OpenAI, poet: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for model in ("llama", "poet"):
        answer = sdk.chat.completions.create(
            model=model, messages=CHAT, response_format=wanted, max_tokens=300, temperature=0
        )
        found = json.loads(answer.choices[0].message.content or "")
        assert found["city"] in {"Paris", "Rome"}
        assert isinstance(found["big"], bool)
        assert answer.choices[0].finish_reason == "stop"


def test_refusals_are_the_sdks_own_exceptions(serving: Serving, sdk: openai.OpenAI) -> None:
    refusals: list[tuple[type[openai.APIStatusError], dict[str, Any], str]] = [
        (openai.NotFoundError, {"model": "nobody"}, "nobody"),
        (openai.NotFoundError, {"model": "ft:llama:acme::abc"}, "ft:llama"),
        (openai.BadRequestError, {"max_tokens": -1}, "max_tokens"),
        (openai.BadRequestError, {"temperature": 2.5}, "temperature"),
        (openai.BadRequestError, {"prompt": PROMPT * 100}, "512"),
    ]
    for kind, fields, said in refusals:
        with pytest.raises(kind, match=said) as refusal:
            complete(sdk, **({"model": "llama"} | fields))
        assert refusal.value.request_id
    with serving.sdk("pp-wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_name_a_version_and_an_alias_mean_one_version(
    http: httpx.Client, sdk: openai.OpenAI, lora: Lora, golden: Golden
) -> None:
    made = [push(http, "poet", lora(seed)) for seed in (1, 2)]
    expected = [golden(lora(seed), PROMPT) for seed in (1, 2)]
    assert expected[0] != expected[1]
    assert http.post("/v1/adapters/poet/aliases", json={"alias": "live", "version": 1}).status_code == 200
    for model, version in {"poet@1": 0, "poet@live": 0, "poet@2": 1, "poet@latest": 1, "poet": 1}.items():
        answer = complete(sdk, model)
        assert answer.choices[0].text == expected[version], model
        assert answer.system_fingerprint == f"fp_{made[version]['digest'][:16]}"
    assert http.post("/v1/adapters/poet/aliases", json={"alias": "live", "version": 2}).status_code == 200
    assert complete(sdk, "poet@live").choices[0].text == expected[1]


def test_a_new_version_never_serves_a_stale_answer(
    http: httpx.Client, sdk: openai.OpenAI, lora: Lora, golden: Golden
) -> None:
    """The prompt is long and was asked before: its keys and values lie in the prefix cache."""
    prompt = PROMPT * 8
    seen = set()
    for seed in (3, 4, 5):
        push(http, "poet", lora(seed))
        expected = golden(lora(seed), prompt)
        cold, warm = complete(sdk, "poet", prompt), complete(sdk, "poet", prompt)
        assert cold.choices[0].text == warm.choices[0].text == expected
        assert (cold.usage.prompt_tokens_details.cached_tokens, cold.system_fingerprint in seen) == (0, False)
        assert warm.usage.prompt_tokens_details.cached_tokens > 0
        seen.add(cold.system_fingerprint)


def test_two_tenants_same_name_is_each_ones_own(
    serving: Serving, http: httpx.Client, lora: Lora, golden: Golden
) -> None:
    with serving.http(serving.tenant("other")) as other:
        push(http, "poet", lora(1))
        push(other, "poet", lora(2))
        for client, seed in ((http, 1), (other, 2), (http, 1)):
            assert ask(client, "poet", PROMPT * 4) == golden(lora(seed), PROMPT * 4)


def test_the_same_bytes_tell_another_tenant_nothing(serving: Serving, http: httpx.Client, lora: Lora) -> None:
    """Not even through the prefix cache: it is a tenant's own, also where weights and prompt are the same."""
    prompt = PROMPT * 8
    push(http, "poet", lora(1))
    ask(http, "poet", prompt)
    with serving.http(serving.tenant("other")) as other:
        push(other, "poet", lora(1))
        answer = other.post("/v1/completions", json={"model": "poet", "prompt": prompt, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
