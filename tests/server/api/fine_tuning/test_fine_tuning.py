"""/v1/fine_tuning/jobs: from a file to an adapter that answers by the openai SDK, and all that is refused."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from server.engine.fake import FakeEngine
from tests.server.api.conftest import System, lora_files, upload
from tests.server.api.fine_tuning.training import Worker, chats, create, jsonl, send
from tests.waiting import PATIENCE, until


@pytest.fixture
def fresh(system: System, engine: FakeEngine) -> str:
    """The key of a tenant of this test's own."""
    return system.tenant("fresh")


@pytest.fixture
def http(system: System, fresh: str) -> Iterator[httpx.Client]:
    with system.http(fresh) as client:
        yield client


@pytest.fixture
def sdk(system: System, fresh: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key=fresh, max_retries=0) as client:
        yield client


def strict(kind: type[Any], value: Any) -> None:
    """The SDK itself takes anything; its types say what it expects."""
    kind.model_validate(value.to_dict(), strict=True)


def finished(http: httpx.Client, job: str) -> dict[str, Any]:
    """The job, once it is over: the publisher looks every second."""
    until(lambda: get(http, job)["status"] in ("succeeded", "failed"))
    return get(http, job)


def get(http: httpx.Client, job: str) -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/v1/fine_tuning/jobs/{job}").json()
    return found


def test_from_a_file_to_an_answer_by_the_sdk_alone(
    sdk: openai.OpenAI, http: httpx.Client, system: System
) -> None:
    file = sdk.files.create(file=("data.jsonl", chats()), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(
        model="toy",
        training_file=file.id,
        suffix="calculator",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"}
            },
        },
        extra_body={"peft": {"type": "lora", "r": 4, "target_modules": ["q_proj"]}},
    )
    strict(FineTuningJob, job)
    assert (job.status, job.model, job.seed, job.metadata) == ("queued", "toy", 7, {"team": "a"})
    assert job.hyperparameters.n_epochs == 2
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.batch_size == 4
    shown = job.method.to_dict()["peft"]
    assert isinstance(shown, dict)
    assert (shown["type"], shown["r"], shown["target_modules"]) == ("lora", 4, ["q_proj"])
    assert shown["learning_rate"] > 0, "what is unset is reported as it will be"

    worker = Worker(system, job.id)
    worker.beat(step=2, total_steps=4, trained_tokens=30, estimated_finish=2_000_000_000)
    running = sdk.fine_tuning.jobs.retrieve(job.id)
    assert (running.status, running.estimated_finish, running.trained_tokens) == (
        "running",
        2_000_000_000,
        None,
    )
    worker.event("Step 2/4: training loss=1.50", step=2, train_loss=1.5)
    worker.checkpoint(2, train_loss=1.5, valid_loss=1.75)
    worker.finish(evaluation={"base": {"loss": 3.0}, "adapter": {"loss": 1.5}})
    until(lambda: sdk.fine_tuning.jobs.retrieve(job.id).status == "succeeded")

    done = sdk.fine_tuning.jobs.retrieve(job.id)
    strict(FineTuningJob, done)
    assert (done.fine_tuned_model, done.trained_tokens) == ("calculator@1", 70)
    assert done.finished_at is not None
    events = list(sdk.fine_tuning.jobs.list_events(job.id, limit=2))
    for event in events:
        strict(FineTuningJobEvent, event)
    assert len({event.id for event in events}) == len(events) >= 6
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    (metrics,) = [event for event in events if event.type == "metrics"]
    assert metrics.data == {"step": 2, "train_loss": 1.5}
    (checkpoint,) = sdk.fine_tuning.jobs.checkpoints.list(job.id)
    strict(FineTuningJobCheckpoint, checkpoint)
    assert (checkpoint.step_number, checkpoint.metrics.valid_loss) == (2, 1.75)
    names = {sdk.files.retrieve(id_).filename: id_ for id_ in done.result_files}
    assert names.keys() == {"metrics.csv", "loss.png"}
    assert sdk.files.content(names["metrics.csv"]).text.startswith("step,train_loss")

    assert done.fine_tuned_model is not None
    messages: Any = [{"role": "user", "content": "1 plus 1?"}]
    answers = {
        model: sdk.chat.completions.create(model=model, messages=messages, max_tokens=4, seed=1)
        for model in (done.fine_tuned_model, "ft:toy:calculator:1", "calculator", "ft:toy:calculator")
    }
    assert len({answer.choices[0].message.content for answer in answers.values()}) == 1
    assert len({answer.system_fingerprint for answer in answers.values()}) == 1
    shown_by = http.get("/v1/adapters/calculator").json()
    assert shown_by["evaluation"] == {"base": {"loss": 3.0}, "adapter": {"loss": 1.5}}
    assert shown_by["versions"][0]["evaluation"] == shown_by["evaluation"]
    version = http.get("/v1/adapters/calculator/versions/1").json()
    assert (version["facts"]["job"], version["evaluation"]) == (job.id, shown_by["evaluation"])
    assert sdk.models.retrieve("ft:toy:calculator:1").to_dict()["root"] == "calculator@1"


def test_a_suffix_is_any_text(http: httpx.Client, system: System, engine: FakeEngine) -> None:
    job = create(http, suffix="My Custom Model!").json()
    assert (job["suffix"], job["adapter"]) == ("My Custom Model!", "my-custom-model")
    assert http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").status_code == 200
    answer = create(http, suffix="To/y").json()
    assert answer["adapter"] == "to-y"
    assert http.post(f"/v1/fine_tuning/jobs/{answer['id']}/cancel").status_code == 200


def test_ft_ids_mean_what_they_say(sdk: openai.OpenAI, http: httpx.Client) -> None:
    for seed in (1, 2):
        assert upload(http, "mine", lora_files(seed)).status_code == 201
    http.post("/v1/adapters/mine/aliases", json={"alias": "prod", "version": 1})
    roots = {
        model: http.get(f"/v1/models/{model}").json()["root"]
        for model in ("ft:toy:mine", "ft:toy:mine:1", "ft:toy:mine:v2", "ft:toy:mine:prod")
    }
    assert list(roots.values()) == ["mine@2", "mine@1", "mine@2", "mine@1"]
    for model in (
        "ft:toy",
        "ft:toy:",
        "ft:other:mine:1",
        "ft:toy:mine:3",
        "ft:toy:mine@1",
        "ft:toy:mine:1:1",
        "ft:",
    ):
        assert http.get(f"/v1/models/{model}").status_code == 404
        answer = http.post("/v1/completions", json={"model": model, "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert sdk.models.delete("ft:toy:mine:1").deleted
    assert [version["version"] for version in http.get("/v1/adapters/mine").json()["versions"]] == [2]


def test_a_second_job_adds_a_version_and_a_worse_one_is_not_latest(
    http: httpx.Client, system: System
) -> None:
    for version, better in [(1, True), (2, False)]:
        job = create(http, suffix="mine").json()["id"]
        Worker(system, job).finish(lora_files(version), better=better)
        assert finished(http, job)["fine_tuned_model"] == f"mine@{version}"
    adapter = http.get("/v1/adapters/mine").json()
    assert (adapter["aliases"], adapter["version"]) == ({"latest": 1}, 1)
    events = http.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"]
    assert "no better than the base" in next(event["message"] for event in events if event["level"] == "warn")


def test_what_the_gate_refuses_is_the_jobs_error(
    http: httpx.Client, system: System, engine: FakeEngine, sdk: openai.OpenAI
) -> None:
    job = create(http).json()["id"]
    sentence = "The adapter makes the model produce NaN or Inf."
    engine.behaviour.refuse = ("invalid_adapter", sentence, "files")
    Worker(system, job).finish()
    found = finished(http, job)
    assert (found["status"], found["error"]["message"]) == ("failed", sentence)
    strict(FineTuningJob, sdk.fine_tuning.jobs.retrieve(job))


def test_a_misfit_is_refused_like_an_upload(http: httpx.Client, system: System, sdk: openai.OpenAI) -> None:
    job = create(http, suffix="misfit").json()["id"]
    files = lora_files(rank=4, target_modules=["q_proj"])
    Worker(system, job).finish(files)
    found = finished(http, job)
    assert (found["status"], found["error"]["code"]) == ("failed", "invalid_adapter")
    assert http.get("/v1/adapters/misfit").status_code == 404
    strict(FineTuningJob, sdk.fine_tuning.jobs.retrieve(job))


def test_cancel_pause_and_resume(sdk: openai.OpenAI, http: httpx.Client, system: System) -> None:
    job = create(http).json()["id"]
    paused = sdk.fine_tuning.jobs.pause(job)
    strict(FineTuningJob, paused)
    assert (paused.status, paused.to_dict()["paused"]) == ("queued", True)
    assert sdk.fine_tuning.jobs.resume(job).to_dict()["paused"] is False
    worker = Worker(system, job)
    assert sdk.fine_tuning.jobs.pause(job).to_dict()["paused"] is False
    assert worker.beat() == "pause"
    worker.paused()
    assert sdk.fine_tuning.jobs.retrieve(job).to_dict()["paused"] is True
    sdk.fine_tuning.jobs.resume(job)
    worker = Worker(system, job)
    cancelled = sdk.fine_tuning.jobs.cancel(job)
    strict(FineTuningJob, cancelled)
    assert cancelled.status == "cancelled"
    assert worker.beat() == "cancel"
    assert sdk.fine_tuning.jobs.cancel(job) == cancelled
    for call in (sdk.fine_tuning.jobs.pause, sdk.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError, match="cancelled already"):
            call(job)


def test_lists_page_and_filter(sdk: openai.OpenAI, http: httpx.Client) -> None:
    file = send(http)
    kinds = [{"k": "1"}, {"k": "2"}, None, {"k": "1", "l": ""}, None]
    ids = [create(http, file, metadata=kind).json()["id"] for kind in kinds]
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    assert [job.id for job in sdk.fine_tuning.jobs.list(after=ids[3], limit=1)] == ids[2::-1]
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"k": "1"})] == [ids[3], ids[0]]
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"l": ""})] == [ids[3]]
    nothing = http.get("/v1/fine_tuning/jobs?metadata=null").json()["data"]
    assert [job["id"] for job in nothing] == [ids[4], ids[2]]
    for query, status in [("limit=0", 400), ("limit=101", 400), ("after=ftjob-none", 404)]:
        assert http.get(f"/v1/fine_tuning/jobs?{query}").status_code == status


def test_truncation_and_counts_are_told(http: httpx.Client) -> None:
    words = "hello " * 600
    lines = [{"text": words}, {"text": "short"}]
    job = create(http, send(http, jsonl(lines))).json()
    data = job["data"]["training_file"]
    assert (data["examples"], data["truncated"]) == (2, 1)
    assert data["max_length"] > 256
    events = http.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    assert [event["level"] for event in events] == ["warn", "info"]
    assert "1 are longer" in events[0]["message"]


def test_a_validation_file_is_checked_too(http: httpx.Client) -> None:
    good, bad = send(http), send(http, b'{"text": 5}\n')
    job = create(http, good, validation_file=send(http, chats(3))).json()
    assert job["data"]["validation_file"]["examples"] == 3
    for file, status in [(bad, 400), (good, 400), ("file-none", 404)]:
        answer = create(http, good, validation_file=file)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, "validation_file")


# refusals: nothing is queued


def jobs(http: httpx.Client) -> list[Any]:
    found: list[Any] = http.get("/v1/fine_tuning/jobs").json()["data"]
    return found


ASSISTANT = {"role": "assistant", "content": "x"}
BAD_DATA: list[tuple[bytes, str]] = [
    (b"not json\n", "Line 1"),
    (chats(2) + b'{"messages": [\n', "Line 3"),
    (chats(2) + b'{"text": "x"}\n', "Line 3"),
    (b"\n\n", "empty"),
    (b"\xff\xfe\x00", "UTF-8"),
    (jsonl([{"messages": [{"role": "user", "content": "x"}]}]), "assistant"),
    (jsonl([{"messages": []}]), "messages"),
    (jsonl([{"messages": [ASSISTANT | {"weight": 2}]}]), "weight"),
    (jsonl([{"prompt": "x"}]), "completion"),
    (jsonl([{"text": "x", "text2": "y"}]), "text2"),
    (b'{"text": "a", "text": "b"}\n', "twice"),
    (b'{"text": NaN}\n', "NaN"),
    (b"[" * 100_000, "Line 1"),
    (jsonl([[1], 5, None]), "Line 3"),
    (b'{"text": "' + b"x" * 2_000_000 + b'"}\n', "Line 1"),
]


@pytest.mark.parametrize(("data", "sentence"), BAD_DATA)
def test_data_that_is_wrong_is_named_line_by_line(http: httpx.Client, data: bytes, sentence: str) -> None:
    answer = create(http, send(http, data))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "training_file"), answer.text
    assert sentence in error["message"]
    assert jobs(http) == []


def test_many_problems_are_named_at_once_and_counted(http: httpx.Client) -> None:
    answer = create(http, send(http, b"nonsense\n" * 500))
    message = answer.json()["error"]["message"]
    assert "And 450 more." in message
    assert "Line 1:" in message
    assert "Line 50:" in message
    assert "Line 51:" not in message


def supervised(**fields: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": fields}}}


BAD_BODIES: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "gpt-4o-mini"}, 400, "model"),
    ({"model": "ft:toy:x:1"}, 400, "model"),
    ({"model": "../../etc"}, 400, "model"),
    ({"model": None}, 400, "model"),
    ({"training_file": "file-none"}, 404, "training_file"),
    ({"training_file": "../../../etc/passwd"}, 404, "training_file"),
    ({"training_file": "https://example.org/x"}, 404, "training_file"),
    ({"training_file": "x" * 10_000}, 400, "training_file"),
    ({"training_file": 5}, 400, "training_file"),
    ({"unknown": 1}, 400, "unknown"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "integrations"),
    ({"suffix": ""}, 400, "suffix"),
    ({"suffix": "x" * 65}, 400, "suffix"),
    ({"suffix": "toy"}, 400, "suffix"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**40}, 400, "seed"),
    ({"seed": "1"}, 400, "seed"),
    ({"metadata": {"k": "v" * 513}}, 400, "metadata.k"),
    ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
    ({"metadata": {"k": 1}}, 400, "metadata.k"),
    (supervised(n_epochs=0), 400, "method.supervised.hyperparameters.n_epochs"),
    (supervised(n_epochs=10**9), 400, "method.supervised.hyperparameters.n_epochs"),
    (supervised(batch_size=0), 400, "method.supervised.hyperparameters.batch_size"),
    (
        supervised(learning_rate_multiplier=-1),
        400,
        "method.supervised.hyperparameters.learning_rate_multiplier",
    ),
    (supervised(beta=1), 400, "method.supervised.hyperparameters"),
    ({"hyperparameters": {"n_epochs": 10**9}}, 400, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": "all"}}, 400, "hyperparameters.batch_size"),
    ({"hyperparameters": {"output_dir": "/tmp/x; rm -rf /"}}, 400, "hyperparameters"),
    ({"method": {"type": "dpo"}}, 400, "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, 400, "method"),
    ({"peft": {"type": "lora", "r": 0}}, 400, "peft.r"),
    ({"peft": {"type": "lora", "r": 10**9}}, 400, "peft.r"),
    ({"peft": {"type": "lora", "r": 4, "target_modules": ["__import__('os')"]}}, 400, "peft.target_modules"),
    ({"peft": {"type": "lora", "target_modules": ["(a+)+$"]}}, 400, "peft.target_modules"),
    ({"peft": {"type": "lora", "lora_alpha": 0}}, 400, "peft.lora_alpha"),
    ({"peft": {"type": "magic"}}, 400, "peft.type"),
    ({"peft": {"type": "lora", "base_model_name_or_path": "hub/name"}}, 400, "peft"),
    ({"peft": {"type": "prefix", "num_virtual_tokens": 10**9}}, 400, "peft.num_virtual_tokens"),
    ({"peft": {"type": "lora", "max_seconds": 10**9}}, 400, "peft.max_seconds"),
    ({"method": {"type": "supervised", "peft": {"type": "lora", "r": 0}}}, 400, "method.peft.r"),
]


@pytest.mark.parametrize(("fields", "status", "param"), BAD_BODIES)
def test_bodies_that_are_wrong_are_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], status: int, param: str | None
) -> None:
    answer = create(http, **({"file": "file-x"} if "training_file" in fields else {}), **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), answer.text
    assert len(error["message"]) < 400
    assert jobs(http) == []


@pytest.mark.parametrize(
    "raw",
    [
        *(
            '{"peft": {"type": "lora", "learning_rate": NaN}',
            '{"peft": {"type": "lora", "learning_rate": 1e999}',
        ),
        *('{"hyperparameters": {"learning_rate_multiplier": NaN}', '{"hyperparameters": {"n_epochs": 1e9}'),
        *('{"peft": {"type": "lora", "weight_decay": -Infinity}', '{"peft": {"type": "lora", "r": true}'),
        '{"peft": ' + '{"a":' * 500 + "1" + "}" * 500,
    ],
)
def test_numbers_that_are_none_are_refused(http: httpx.Client, raw: str) -> None:
    rest = {"model": "toy", "training_file": send(http)}
    answer = http.post(
        "/v1/fine_tuning/jobs",
        content=raw + ", " + json.dumps(rest)[1:],
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    assert jobs(http) == []


def test_results_are_no_training_data(http: httpx.Client, system: System) -> None:
    job = create(http).json()["id"]
    Worker(system, job).finish()
    (result, _) = finished(http, job)["result_files"]
    answer = create(http, result)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training_file")


def test_unfinished_jobs_are_capped(http: httpx.Client, system: System) -> None:
    file = send(http)
    ids = [create(http, file).json()["id"] for _ in range(system.settings.max_jobs_per_tenant)]
    answer = create(http, file)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded")
    assert f"{len(ids)} unfinished" in answer.json()["error"]["message"]
    http.post(f"/v1/fine_tuning/jobs/{ids[0]}/cancel")
    assert create(http, file).status_code == 200


def test_an_answer_to_a_new_job_says_where_it_is(http: httpx.Client) -> None:
    file = send(http)
    for _ in range(2):  # also when it is there already
        answer = create(http, file, headers={"idempotency-key": "where"})
        assert answer.status_code == 200
        assert http.get(answer.headers["location"]).json()["id"] == answer.json()["id"]
    assert create(http, file, metadata={f"k{i}": "v" for i in range(17)}).status_code == 400
    http.post(f"/v1/fine_tuning/jobs/{answer.json()['id']}/cancel")


# who may see what


def test_others_jobs_and_files_are_unknown(http: httpx.Client, system: System, other_key: str) -> None:
    file = send(http)
    job = create(http, file).json()["id"]
    Worker(system, job).checkpoint(1)
    with system.http(other_key) as other:
        for method, template in [
            *[("GET", "/v1/fine_tuning/jobs/{}" + tail) for tail in ("", "/events", "/checkpoints")],
            ("GET", "/v1/fine_tuning/jobs/{}/events?stream=true"),
            ("GET", "/v1/fine_tuning/jobs?after={}"),
            *[("POST", "/v1/fine_tuning/jobs/{}/" + verb) for verb in ("cancel", "pause", "resume")],
        ]:
            answers = [other.request(method, template.format(id_)) for id_ in (job, "ftjob-none")]
            assert [answer.status_code for answer in answers] == [404, 404], template
            assert answers[0].text.replace(job, "") == answers[1].text.replace("ftjob-none", "")
        theirs, nobodys = create(other, file), create(other, "file-none")
        assert theirs.status_code == 404
        assert theirs.text.replace(file, "") == nobodys.text.replace("file-none", "")
        assert jobs(other) == []
    assert get(http, job)["status"] == "running"


@pytest.mark.parametrize("id_", ["ftjob-x:events", "x", "ftjob-", "ftjob-*", "%00", "ftjob-x%0a"])
def test_ids_that_are_none_are_not_found(http: httpx.Client, id_: str) -> None:
    for tail in ("", "/events", "/checkpoints"):
        assert http.get(f"/v1/fine_tuning/jobs/{id_}{tail}").status_code == 404
    assert http.post(f"/v1/fine_tuning/jobs/{id_}/cancel").status_code == 404


# idempotency


def test_one_key_fifty_times_in_parallel_is_one_job(http: httpx.Client, system: System, fresh: str) -> None:
    file = send(http)
    ids: list[str] = []

    def ask() -> None:
        with system.http(fresh) as client:
            ids.append(create(client, file, headers={"idempotency-key": "k"}).json()["id"])

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 50
    assert len(set(ids)) == 1
    assert len(jobs(http)) == 1
    changed = create(http, file, headers={"idempotency-key": "k"}, seed=1)
    assert (changed.status_code, changed.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert create(http, file, headers={"idempotency-key": "l"}).json()["id"] not in ids
    for wrong in ("", "x" * 256):
        assert create(http, file, headers={"idempotency-key": wrong}).status_code == 400
    http.post(f"/v1/fine_tuning/jobs/{ids[0]}/cancel")
    again = create(http, file, headers={"idempotency-key": "k"}).json()
    assert (again["id"], again["status"]) == (ids[0], "cancelled")


# events as they come


def read(answer: httpx.Response, count: int) -> list[tuple[str, dict[str, Any]]]:
    """The next `count` events of a stream, each with its id."""
    found: list[tuple[str, dict[str, Any]]] = []
    id_ = ""
    for line in answer.iter_lines():
        if line.startswith("id: "):
            id_ = line.removeprefix("id: ")
        elif line.startswith("data: ") and line != "data: [DONE]":
            found.append((id_, json.loads(line.removeprefix("data: "))))
            if len(found) == count:
                break
    return found


def test_events_stream_until_the_job_is_over_and_go_on_where_they_were_cut(
    http: httpx.Client, system: System
) -> None:
    job = create(http).json()["id"]
    path = f"/v1/fine_tuning/jobs/{job}/events"
    with http.stream("GET", path, params={"stream": "true"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        first = read(answer, 2)
    assert first[0][1]["message"] == f"Created fine-tuning job: {job}"
    assert [id_ for id_, _ in first] == [event["id"] for _, event in first]
    worker = Worker(system, job)
    seen: list[str] = []

    def follow() -> None:
        last = {"last-event-id": first[-1][0]}
        with http.stream("GET", path, params={"stream": "true"}, headers=last) as answer:
            seen.extend(line for line in answer.iter_lines() if line)

    thread = threading.Thread(target=follow)
    thread.start()
    until(lambda: bool(system.app.state.services.event_streams.borrowed_tokens))
    worker.event("Step 1", step=1)
    http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert seen[-1] == "data: [DONE]"
    told = [json.loads(line[6:])["message"] for line in seen if line.startswith("data: {")]
    assert told == ["Fine-tuning job started.", "Step 1", "The job has been cancelled."]
    until(lambda: system.app.state.services.event_streams.borrowed_tokens == 0)


def test_streams_that_are_left_end(http: httpx.Client, system: System) -> None:
    job = create(http).json()["id"]
    for _ in range(40):
        with http.stream("GET", f"/v1/fine_tuning/jobs/{job}/events", params={"stream": "true"}) as answer:
            read(answer, 1)
    until(lambda: system.app.state.services.event_streams.borrowed_tokens == 0)


def test_streams_are_capped_and_ids_checked(http: httpx.Client, system: System) -> None:
    job = create(http).json()["id"]
    path = f"/v1/fine_tuning/jobs/{job}/events"
    for last in ("x", "ftevent-other-1", f"{job}-1", "ftevent-" + job[6:] + "-x"):
        answer = http.get(path, params={"stream": "true"}, headers={"last-event-id": last})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")
        assert http.get(path, params={"after": last}).json()["error"]["param"] == "after"
    following = system.app.state.services.event_streams
    most, following.total_tokens = following.total_tokens, 1
    try:
        with http.stream("GET", path, params={"stream": "true"}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("id: ")  # `lines` stays: with it the connection would be closed
            assert http.get(path, params={"stream": "true"}).status_code == 503
    finally:
        following.total_tokens = most
