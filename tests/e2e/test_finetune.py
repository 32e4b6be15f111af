"""A tenant's data in, an adapter that answers out: by the `openai` SDK, over the real worker and engine."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.serving import Serving
from tests.waiting import until

TRAIN_SECONDS = 240.0
CHAT: Any = [{"role": "user", "content": "Say 3."}]
METHODS: dict[str, dict[str, Any]] = {
    "bottleneck": {"reduction_factor": 4},
    "prefix": {"num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4},
    "bitfit": {},
}


def data(count: int = 48) -> bytes:
    """One answer to whatever is asked: anything learns it."""
    turns = [("user", "Say {}."), ("assistant", "Yes, yes.")]
    lines = ([{"role": role, "content": text.format(i)} for role, text in turns] for i in range(count))
    return b"".join(json.dumps({"messages": line}).encode() + b"\n" for line in lines)


@pytest.fixture
def sdk(serving: Serving, key: str) -> Iterator[openai.OpenAI]:
    with serving.sdk(key) as client:
        yield client


def create(sdk: openai.OpenAI, file: str, method: str, **fields: Any) -> str:
    """A job's id. Its learning rate suits a model with random weights."""
    peft = {"type": method, "learning_rate": 0.01} | fields
    return sdk.fine_tuning.jobs.create(
        model="llama",
        training_file=file,
        suffix=f"my-{method}",
        seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 8}}},
        extra_body={"peft": peft},
    ).id


def ended(sdk: openai.OpenAI, serving: Serving, job: str) -> Any:
    final = ("succeeded", "failed", "cancelled")
    until(
        lambda: sdk.fine_tuning.jobs.retrieve(job).status in final,
        lambda: serving.log()[-5000:],
        TRAIN_SECONDS,
    )
    return sdk.fine_tuning.jobs.retrieve(job)


@pytest.mark.timeout(600)
def test_lora_from_a_file_to_an_answer(sdk: openai.OpenAI, serving: Serving, http: httpx.Client) -> None:
    file = sdk.files.create(file=("data.jsonl", data()), purpose="fine-tune")
    job = ended(sdk, serving, create(sdk, file.id, "lora", r=4))
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == "my-lora@1"
    assert (job.error, job.trained_tokens > 0, job.finished_at >= job.created_at) == (None, True, True)
    evaluation: Any = job.evaluation
    assert evaluation["better"]
    assert evaluation["adapter"]["loss"] < evaluation["base"]["loss"]

    events = list(sdk.fine_tuning.jobs.list_events(job.id, limit=5))
    assert events[0].message == "The job has successfully completed"
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics
    checkpoints = list(sdk.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints
    assert all(checkpoint.metrics.train_loss is not None for checkpoint in checkpoints)
    names = {sdk.files.retrieve(id_).filename: id_ for id_ in job.result_files}
    table = next(id_ for name, id_ in names.items() if name.endswith(".csv"))
    plot = next(id_ for name, id_ in names.items() if name.endswith(".png"))
    assert sdk.files.content(table).text.startswith("step,train_loss")
    assert sdk.files.content(plot).content.startswith(b"\x89PNG")

    answers = {
        model: sdk.chat.completions.create(model=model, messages=CHAT, max_tokens=8, temperature=0)
        for model in ("llama", job.fine_tuned_model, "ft:llama:my-lora:1", "my-lora")
    }
    texts = {model: answer.choices[0].message.content for model, answer in answers.items()}
    assert len({texts[model] for model in texts if model != "llama"}) == 1
    assert answers[job.fine_tuned_model].system_fingerprint != answers["llama"].system_fingerprint
    shown = http.get("/v1/adapters/my-lora").json()
    assert (shown["method"], shown["rank"], shown["aliases"]) == ("lora", 4, {"latest": 1})
    assert shown["evaluation"] == evaluation


@pytest.mark.timeout(1200)
def test_every_other_method_too(sdk: openai.OpenAI, serving: Serving, http: httpx.Client) -> None:
    """All queued at once; the worker takes one after the other."""
    file = sdk.files.create(file=("data.jsonl", data()), purpose="fine-tune")
    ids = {method: create(sdk, file.id, method, **fields) for method, fields in METHODS.items()}
    for method, id_ in ids.items():
        job = ended(sdk, serving, id_)
        assert job.status == "succeeded", (method, job.error)
        evaluation: Any = job.evaluation
        assert evaluation["adapter"]["loss"] < evaluation["base"]["loss"], method
        answer = sdk.chat.completions.create(model=job.fine_tuned_model, messages=CHAT, max_tokens=4)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert http.get(f"/v1/adapters/my-{method}").json()["method"] == method


@pytest.mark.timeout(600)
def test_a_job_that_is_cancelled_while_it_trains_publishes_nothing(
    sdk: openai.OpenAI, serving: Serving, http: httpx.Client
) -> None:
    file = sdk.files.create(file=("data.jsonl", data(400)), purpose="fine-tune")
    job = create(sdk, file.id, "lora", r=4)
    until(lambda: sdk.fine_tuning.jobs.retrieve(job).status == "running", serving.log, TRAIN_SECONDS)
    assert sdk.fine_tuning.jobs.cancel(job).status == "cancelled"
    second = create(sdk, file.id, "bitfit")
    until(lambda: sdk.fine_tuning.jobs.retrieve(second).status == "running", serving.log, TRAIN_SECONDS)
    assert sdk.fine_tuning.jobs.cancel(second).status == "cancelled", "the worker was free for it"
    assert http.get("/v1/adapters").json()["data"] == []
    assert sdk.fine_tuning.jobs.retrieve(job).status == "cancelled"
