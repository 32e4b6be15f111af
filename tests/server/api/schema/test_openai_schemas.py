"""Every answer of OpenAI's routes is valid against OpenAI's own document."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.clients.fields import fields_table
from tests.clients.table import DOCUMENT as DOCUMENTATION
from tests.server.api.conftest import System, upload
from tests.server.api.fine_tuning.test_files import announced
from tests.server.api.fine_tuning.training import Worker, create, send

DOCUMENT = json.loads((Path(__file__).parents[3] / "golden" / "openai_schemas.json").read_text())
HELLO = [{"role": "user", "content": "hello"}]
Check = Callable[[httpx.Response, str], dict[str, Any]]


@pytest.fixture
def valid() -> Check:
    """Check an answer against a schema of the document, and return its JSON."""

    def check(answer: httpx.Response, name: str) -> dict[str, Any]:
        body: dict[str, Any] = answer.json()
        validate(body, name)
        return body

    return check


def validate(body: Any, name: str) -> None:
    schema = DOCUMENT | {"$ref": f"#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema).validate(body)


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}])
def test_chat_completions(http: httpx.Client, valid: Check, fields: dict[str, Any]) -> None:
    body = {"model": "toy", "messages": HELLO, "max_tokens": 4} | fields
    valid(http.post("/v1/chat/completions", json=body), "CreateChatCompletionResponse")


@pytest.mark.parametrize("fields", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}])
def test_streams_of_chat_completions(http: httpx.Client, fields: dict[str, Any]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": "toy", "messages": HELLO, "max_tokens": 4} | options | fields
    lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")[:-2]
    assert len(lines) > 2
    for line in lines:
        chunk = json.loads(line.removeprefix("data: "))
        usage = chunk.pop("usage")  # null before the last, as OpenAI sends it, and its document has not
        validate(chunk | ({} if usage is None else {"usage": usage}), "CreateChatCompletionStreamResponse")


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"n": 2, "best_of": 3}, {"echo": True}])
def test_completions(http: httpx.Client, valid: Check, fields: dict[str, Any]) -> None:
    body = {"model": "toy", "prompt": "x", "max_tokens": 4} | fields
    valid(http.post("/v1/completions", json=body), "CreateCompletionResponse")


def test_models(http: httpx.Client, valid: Check) -> None:
    assert upload(http, "mine").status_code == 201
    assert len(valid(http.get("/v1/models"), "ListModelsResponse")["data"]) == 2
    valid(http.get("/v1/models/mine"), "Model")
    valid(http.delete("/v1/models/mine"), "DeleteModelResponse")


def test_files_and_uploads(http: httpx.Client, valid: Check) -> None:
    file = send(http)
    valid(http.get(f"/v1/files/{file}"), "OpenAIFile")
    life = {"expires_after": {"anchor": "created_at", "seconds": 3600}}
    for fields in ({}, life):
        pending = valid(http.post("/v1/uploads", json=announced(4, **fields)), "Upload")["id"]
        part = valid(http.post(f"/v1/uploads/{pending}/parts", files={"data": b"1234"}), "UploadPart")["id"]
        done = http.post(f"/v1/uploads/{pending}/complete", json={"part_ids": [part]})
        assert valid(done, "Upload")["status"] == "completed"
    cancelled = http.post("/v1/uploads", json=announced(4)).json()["id"]
    valid(http.post(f"/v1/uploads/{cancelled}/cancel"), "Upload")
    assert len(valid(http.get("/v1/files"), "ListFilesResponse")["data"]) >= 3
    valid(http.delete(f"/v1/files/{file}"), "DeleteFileResponse")


def test_fine_tuning(http: httpx.Client, system: System, valid: Check) -> None:
    job = valid(create(http, suffix="Any text"), "FineTuningJob")["id"]
    path = f"/v1/fine_tuning/jobs/{job}"
    worker = Worker(system, job)
    worker.event("Step 2/4: training loss=1.50", step=2, train_loss=1.5)
    worker.checkpoint(2, train_loss=1.5, valid_loss=1.75)
    assert valid(http.get(path), "FineTuningJob")["status"] == "running"
    assert valid(http.get(f"{path}/events"), "ListFineTuningJobEventsResponse")["data"]
    assert valid(http.get(f"{path}/checkpoints"), "ListFineTuningJobCheckpointsResponse")["data"]
    valid(http.post(f"{path}/cancel"), "FineTuningJob")
    valid(http.get("/v1/fine_tuning/jobs"), "ListPaginatedFineTuningJobsResponse")


def test_errors(http: httpx.Client, system: System, valid: Check) -> None:
    valid(http.post("/v1/chat/completions", json={"model": "toy", "x": 1}), "ErrorResponse")
    valid(http.get("/v1/models/nobody"), "ErrorResponse")
    valid(http.get("/v1/files/nobody"), "ErrorResponse")
    with system.http("wrong") as anybody:
        valid(anybody.get("/v1/models"), "ErrorResponse")


def test_the_table_of_fields_is_up_to_date() -> None:
    """After a change of a body: python -m tests.clients.fields"""
    assert fields_table() in DOCUMENTATION.read_text()
