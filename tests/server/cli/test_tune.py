"""`polypeft tune` and `polypeft jobs`: what they send, show and refuse. The worker is a thread of ours."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.finetune.jobs.job import JobError
from tests.server.api.conftest import System
from tests.server.api.fine_tuning.training import Worker, chats, jsonl
from tests.server.cli.conftest import Run
from tests.waiting import PATIENCE, until

JOBS = "/v1/fine_tuning/jobs"
SIDE = {"loss": 2.5, "perplexity": 12.18, "token_accuracy": 0.25, "exact_match": 0.0}
EVALUATION: dict[str, Any] = {
    "base": SIDE | {"label_accuracy": 0.5},
    "adapter": {
        "loss": 0.5,
        "perplexity": 1.649,
        "token_accuracy": 0.875,
        "exact_match": 0.75,
        "label_accuracy": 1.0,
    },
    "labels": [{"label": " It is \x1b[2J.", "examples": 4, "base": 2, "adapter": 4}],
    "examples": 4,
    "better": True,
    "overfitted": False,
    "best_step": 2,
    "last_step": 4,
}


@pytest.fixture
def key(system: System) -> str:
    """Of a tenant of this test's own."""
    return system.tenant("tuner")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(chats())
    return path


def step(worker: Worker, number: int, total: int = 4, **figures: float) -> None:
    figures = {
        "train_loss": 2.0 / number,
        "trained_tokens": 100.0 * number,
        "seconds": 2.0 * number,
    } | figures
    worker.event(
        f"Step {number}/{total}: training loss={figures['train_loss']:.4f}",
        step=number,
        total_steps=total,
        **figures,
    )


def learn(worker: Worker, **result: Any) -> None:
    step(worker, 1)
    worker.event("Step 1: validation loss=1.7500, the best so far", step=1, valid_loss=1.75)
    step(worker, 2, 2)
    worker.finish(**({"evaluation": EVALUATION} | result))


@contextmanager
def working(system: System, key: str, work: Callable[[Worker], None]) -> Iterator[None]:
    """`work` on the tenant's first waiting job, as soon as there is one."""
    faults: list[BaseException] = []

    def run() -> None:
        try:
            until(lambda: job(system, key)["status"] == "queued")
            work(Worker(system, job(system, key)["id"]))
        except BaseException as fault:  # noqa: BLE001 - raised again in the test's own thread
            faults.append(fault)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE)
    if faults:
        raise faults[0]


def files(system: System, key: str) -> list[str]:
    with system.http(key) as client:
        return [file["filename"] for file in client.get("/v1/files").json()["data"]]


def job(system: System, key: str) -> dict[str, Any]:
    """The newest."""
    with system.http(key) as client:
        found: list[dict[str, Any]] = client.get(JOBS).json()["data"]
    return found[0] if found else {"status": "none"}


def test_from_a_file_to_the_command_that_chats(run: Run, system: System, key: str, data: Path) -> None:
    with working(system, key, learn):
        done = run("tune", str(data), "--name", "sums", "--key", key)
    assert done.status == 0, done.err
    table, sentences = done.out.split("\n\n", 1)
    assert [line.split("\t") for line in table.splitlines()] == [
        ["loss", "2.500", "0.500"],
        ["perplexity", "12.18", "1.649"],
        ["tokens right", "25.0%", "87.5%"],
        ["answers right", "0.0%", "75.0%"],
        ["labels right", "50.0%", "100.0%"],
        ["  It is \\x1b[2J.", "2 of 4", "4 of 4"],
    ]
    assert sentences == (
        "sums@1 is better than the base on 4 held-out examples.\n"
        "`latest` of sums is now version 1.\n\n"
        f"  polypeft chat --adapter sums --url {system.url}\n"
    )
    for said in ("polypeft jobs follow ftjob-", "Step 1: validation loss=1.7500", "Step 2/2: training loss"):
        assert said in done.err
    assert "\x1b" not in done.out + done.err


def test_every_option_reaches_the_job(run: Run, system: System, key: str, tmp_path: Path, data: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_bytes(chats(3))
    own = ("--r", "4", "--lora-alpha", "8", "--lora-dropout", "0", "--target-modules", "q_proj,v_proj")
    rest = ("--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-3", "--use-rslora", "--seed", "7")
    last = ("--validation", str(held_out), "--publish", "always", "--scheduler", "cosine", "--detach")
    done = run("tune", str(data), "--name", "all", *own, *rest, *last, "--key", key)
    made = job(system, key)
    assert (done.status, done.out) == (0, f"{made['id']}\n")
    assert made["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    peft = made["method"]["peft"]
    wanted: dict[str, Any] = {"type": "lora", "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0}
    wanted |= {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "use_dora": False}
    wanted |= {"learning_rate": 1e-3, "publish": "always", "scheduler": "cosine"}
    assert peft | wanted == peft
    assert (made["seed"], made["adapter"], made["data"]["validation_file"]["examples"]) == (7, "all", 3)


def test_one_that_is_no_better_leaves_latest_where_it_is(
    run: Run, system: System, key: str, data: Path
) -> None:
    with working(system, key, learn):
        assert run("tune", str(data), "--name", "sums", "--key", key).status == 0
    worse = EVALUATION | {"better": False, "overfitted": True}
    with working(system, key, lambda worker: learn(worker, better=False, evaluation=worse)):
        done = run("tune", str(data), "--name", "sums", "--key", key)
    assert done.status == 0
    assert "sums@2 is not better than the base on 4 held-out examples" in done.out
    assert "`latest` of sums stays at version 1." in done.out
    assert "It began to overfit: of 4 steps, the adapter of step 2 is kept." in done.out
    assert f"polypeft chat --adapter sums@2 --url {system.url}" in done.out


def test_without_held_out_examples_there_is_no_comparison(
    run: Run, system: System, key: str, data: Path
) -> None:
    with working(system, key, lambda worker: learn(worker, better=None, evaluation=None)):
        done = run("tune", str(data), "--name", "sums", "--key", key)
    assert (done.status, "\t" in done.out) == (0, False)
    assert "Nothing was held out" in done.out


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "chat"),
        ({"prompt": "a", "completion": "b"}, "complete"),
        ({"text": "a b"}, "complete"),
    ],
)
def test_the_command_at_the_end_suits_the_data(
    line: Any, command: str, run: Run, system: System, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + jsonl([line] * 3))
    with working(system, key, learn):
        done = run("tune", str(path), "--name", "x", "--key", key)
    commands = [said.split()[1] for said in done.out.splitlines() if said.startswith("  polypeft")]
    assert commands == [command]


def test_a_failed_job_is_a_sentence_and_status_1(run: Run, system: System, key: str, data: Path) -> None:
    def fail(worker: Worker) -> None:
        error = JobError("non_finite_loss", "The loss became nan in step 3 of 4.")
        jobs = system.app.state.services.jobs
        system.call(jobs.fail(worker.job.id, worker.job.fence, error, retry=False))

    with working(system, key, fail):
        done = run("tune", str(data), "--name", "x", "--key", key)
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines()[-1] == "The job has failed: The loss became nan in step 3 of 4."


def test_a_cancelled_job_is_a_sentence_and_status_1(run: Run, system: System, key: str, data: Path) -> None:
    id_ = run("tune", str(data), "--detach", "--key", key).out.strip()
    assert run("jobs", "cancel", id_, "--key", key).out == f"{id_} is cancelled.\n"
    done = run("jobs", "follow", id_, "--key", key)
    assert (done.status, done.out) == (1, "")
    assert done.err.splitlines()[-1] == f"The job {id_} is cancelled: there is no new version."


def test_jobs_are_listed_shown_paused_and_resumed(run: Run, system: System, key: str, data: Path) -> None:
    id_ = run("tune", str(data), "--name", "x", "--method", "bitfit", "--detach", "--key", key).out.strip()
    assert run("jobs", "pause", id_, "--key", key).out == f"{id_} is paused.\n"
    assert run("jobs", "list", "--key", key).out == f"{id_}\tpaused\tx\tbitfit\t-\n"
    assert run("jobs", "resume", id_, "--key", key).out == f"{id_} is queued.\n"
    assert json.loads(run("jobs", "show", id_, "--key", key).out)["id"] == id_
    other = system.tenant("other")
    refused = run("jobs", "cancel", id_, "--key", other)
    assert (refused.status, refused.err) == (1, f"There is no fine-tuning job '{id_}'.\n")


def test_what_a_job_leaves_is_fetched(run: Run, system: System, key: str, data: Path, tmp_path: Path) -> None:
    with working(system, key, learn):
        run("tune", str(data), "--name", "x", "--key", key)
    into = tmp_path / "new" / "folder"
    done = run("jobs", "results", job(system, key)["id"], "--into", str(into), "--key", key)
    assert done.status == 0, done.err
    written = {Path(line).name: Path(line).read_bytes() for line in done.out.splitlines()}
    assert {name[-4:] for name in written} == {".csv", ".png"}
    assert b"step,train_loss" in b"".join(written.values())
    assert run("jobs", "results", job(system, key)["id"], "--into", str(data), "--key", key).status == 1


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_come_back(system: System, key: str, data: Path) -> None:
    # as at a terminal, also where these tests run in the background, which ignores SIGINT
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heed}; from server.cli.main import main; main()", "tune", str(data)]
    environment = os.environ | {"POLYPEFT_URL": system.url, "POLYPEFT_API_KEY": key}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        id_ = process.stderr.readline().split()[1].rstrip(".")
        assert "examples of" in process.stderr.readline() + process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert said.splitlines()[-1] == (
        f"The job goes on. To end it: polypeft jobs cancel {id_} --url {system.url}"
    )
    assert (job(system, key)["id"], job(system, key)["status"]) == (id_, "queued")


def test_what_is_wrong_with_the_data_is_said_line_by_line(
    run: Run, system: System, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(jsonl([{"text": "a"}, {"text": ""}]) + b"no json\n" * 60)
    done = run("tune", str(path), "--key", key)
    first, second, third, *_, last = done.err.splitlines()
    assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 52)
    assert first == "training_file cannot be trained on."
    assert second == "Line 2: text is blank, so there is nothing to learn."
    assert third.startswith("Line 3: The line is not JSON")
    assert last == "And 11 more."
    assert files(system, key) == []


def test_a_refused_job_leaves_no_file_and_a_known_file_is_not_sent_again(
    run: Run, system: System, key: str, data: Path
) -> None:
    assert run("tune", str(data), "--r", "0", "--key", key).status == 1
    assert files(system, key) == []
    for _ in range(2):
        assert run("tune", str(data), "--detach", "--key", key).status == 0
    assert files(system, key) == ["data.jsonl"]
    assert run("tune", str(data), "--r", "0", "--key", key).status == 1
    assert files(system, key) == ["data.jsonl"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--method", "foo"), "peft.type is 'foo'; it must be lora or"),
        (("--r", "0"), "peft.r is 0; expected int >= 1"),
        (("--r", "many"), "peft.r is 'many'; expected int"),
        (("--epochs", "9" * 400), "hyperparameters.n_epochs is 999"),
        (("--learning-rate", "NaN"), "peft.learning_rate is 'NaN'; expected float"),
        (("--lora-alpha", "1e999"), "peft.lora_alpha is '1e999'; expected float"),
        (("--method", "bitfit", "--r", "4"), "'r' is not a field of peft"),
        (("--target-modules", "c_attn"), "peft.target_modules is ['c_attn']; 'c_attn' is no linear layer"),
        (("--name", "x" * 65), "suffix "),
        (("--name", "\udcff"), "'\\udcff' cannot be sent"),
        (("--seed", "-1"), "seed "),
        (("--publish", "maybe"), "peft.publish is 'maybe'"),
        (("--url", "http://127.0.0.1:1"), "The server at http://127.0.0.1:1 cannot be reached"),
        (("--url", "nowhere"), "The server at nowhere cannot be reached"),
        (("--key", "pp-wrong"), "The API key is not valid."),
        (("--validation", "/nowhere"), "'/nowhere' cannot be read: No such file or directory."),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_1(
    options: tuple[str, ...], sentence: str, run: Run, key: str, data: Path
) -> None:
    done = run("tune", str(data), "--key", key, *options)
    assert (done.status, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert done.err.startswith(sentence)


def test_what_is_no_file_of_data_is_one_sentence_and_status_1(run: Run, key: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\x80\xff" * 99)
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(1 << 30)
    said = {}
    for name in ("missing", "empty", "binary", "giant", "."):
        done = run("tune", str(tmp_path / name), "--key", key)
        assert (done.status, done.out) == (1, ""), name
        said[name] = done.err.splitlines()[-1]
    assert said["missing"].endswith("cannot be read: No such file or directory.")
    assert said["empty"].endswith("is empty.")
    assert said["binary"] == "Line 1: The line is not UTF-8 at byte 0."
    assert "has 1073741824 bytes, and the server takes 67108864 at most" in said["giant"]
    assert said["."].endswith("is a folder.")
