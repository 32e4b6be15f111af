"""Requests that are answered, of every route; each function fills one page."""

import json
from typing import Any

from tests.same_answers import adapters
from tests.same_answers.adapters import form
from tests.same_answers.serving import client, wait_for_jobs
from tests.same_answers.session import BASE, PROMPT, Session

KINDS = {
    "lora": adapters.lora(1, 4),
    "bottleneck": adapters.bottleneck(1),
    "prefix": adapters.prefix(1),
    "prompt": adapters.prompt(2, 8),
    "bitfit": adapters.bitfit(1, 64),
}
SAMPLED = {"temperature": 1.0, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
LINES = [
    {"text": f"How do I return a {thing}? Call 555-0100."} for thing in ("lamp", "desk", "vase", "clock")
]
DATA = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
JOBS = "/v1/fine_tuning/jobs"
POET = "/v1/adapters/lora"


def completions(to: Session) -> None:
    tokens = [504, 3575, 282, 4649, 314]
    for fields in (
        {},
        {"prompt": [PROMPT, "One and one is"]},
        {"prompt": tokens},
        {"prompt": [tokens, tokens[:2]]},
        {"max_tokens": None},
        {"echo": True},
        {"echo": True, "logprobs": 2},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        {"prompt_logprobs": 1},
        {"logprobs": 3},
        {"n": 3} | SAMPLED,
        {"n": 2, "best_of": 2} | SAMPLED,
        {"stop": " Paris"},
        {"stop": ["never", "\n"], "max_tokens": 20},
        {"stop_token_ids": [30], "max_tokens": 20},
        {"min_tokens": 8, "ignore_eos": True},
        {"logit_bias": {"7042": -100}},
        {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "max_tokens": 20},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05} | SAMPLED,
        {"user": "somebody", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 1},
        {"stream": True, "n": 2, "stop": "Paris"} | SAMPLED,
        {"prompt": PROMPT * 12},
        {"prompt": PROMPT * 12},  # its beginning is in the prefix cache now
    ):
        to.complete(**fields)


def chat(to: Session) -> None:
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Two "}, {"type": "text", "text": "colours?"}]},
        {"role": "assistant", "content": "Red.", "refusal": None},
        {"role": "user", "content": "One more, é 漢 🙂", "name": "me"},
    ]
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    for fields in (
        {},
        {"messages": talk},
        {"max_tokens": None, "max_completion_tokens": 5},
        {"n": 2} | SAMPLED,
        {"logprobs": True, "top_logprobs": 2, "max_tokens": 3},
        {"stop": ["."], "max_tokens": 30},
        {"response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"]},
        {"response_format": {"type": "json_object"}, "max_tokens": 30},
        {"response_format": {"type": "json_object", "schema": SCHEMA}, "max_tokens": 40},
        {"response_format": named, "max_tokens": 40},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "max_tokens": 3},
        {"stream": True, "n": 2} | SAMPLED,
        {"model": "lora"},
    ):
        to.chat(**fields)


def uploads_of_adapters(to: Session) -> None:
    for name, files in KINDS.items():
        to.ask("acme", "POST", "/v1/adapters", data={"name": name}, files=form(files))
        to.complete(model=name, ignore_eos=True)
        to.ask("acme", "GET", f"/v1/adapters/{name}/versions/1")
    for seed in (3, 2):
        to.ask("acme", "POST", "/v1/adapters", data={"name": "lora"}, files=form(adapters.lora(seed)))
    to.ask("zeta", "POST", "/v1/adapters", data={"name": "lora"}, files=form(adapters.lora(3, 2)))
    beside = {"README.md": b"words", "tokenizer.json": b"{}", "training_args.bin": b"\x80"}
    noop = adapters.lora(1, 0) | beside
    to.ask("acme", "POST", "/v1/adapters", data={"name": "noop", "allow_noop": "true"}, files=form(noop))
    for several in (
        [{"name": "lora@2", "weight": 0.5}, {"name": "bitfit", "weight": 0.25}],
        [{"name": "prompt"}, {"name": "lora", "weight": -1.5}],
    ):
        to.complete(adapters=several, ignore_eos=True)
    for model in (f"ft:{BASE}:lora:1", "lora@1", "lora@latest", "lora"):
        to.complete(model=model)


def lists_of_adapters(to: Session) -> None:
    for path in (
        "/v1/models",
        f"/v1/models/{BASE}",
        "/v1/models/lora",
        "/v1/models/lora@2",
        "/v1/adapters",
        "/v1/adapters?limit=2",
        "/v1/adapters?limit=2&after=bottleneck",
        "/v1/adapters?deleted=true",
        POET,
        f"{POET}/history",
        f"{POET}/versions/latest",
        f"{POET}/versions/1/download?file=adapter_config.json",
        f"{POET}/versions/1/download",
        f"{POET}/pin",
    ):
        to.ask("acme", "GET", path)
    to.ask("zeta", "GET", "/v1/models")


def aliases_and_pins(to: Session) -> None:
    aliases = f"{POET}/aliases"
    for body in (
        {"alias": "live", "version": 1},
        {"alias": "live", "version": 2},
        {"alias": "live", "weights": {"1": 0.9, "v2": 0.1}},
        {"alias": "latest", "version": 2},
    ):
        to.ask("acme", "POST", aliases, json=body)
    etag = to.ask("acme", "GET", f"{aliases}/live").headers["etag"]
    to.ask("acme", "POST", f"{aliases}/live/rollback", headers={"if-match": etag})
    to.ask("acme", "POST", f"{aliases}/live/rollback", headers={"if-match": etag})  # it moved since
    for method, path in (
        ("GET", f"{aliases}/live"),
        ("POST", f"{aliases}/live/rollback"),
        ("DELETE", f"{aliases}/live"),
        ("DELETE", f"{aliases}/latest"),
        ("POST", f"{POET}/pin"),
        ("GET", f"{POET}/pin"),
        ("DELETE", f"{POET}/pin"),
        ("DELETE", f"{POET}/versions/3"),
        ("GET", "/v1/adapters?deleted=true"),
        ("POST", f"{POET}/restore?version=3"),
        ("DELETE", f"{POET}/versions/3?purge=true"),
        ("DELETE", "/v1/models/prefix"),
        ("DELETE", "/v1/adapters/prompt"),
        ("POST", "/v1/adapters/prompt/restore"),
        ("GET", POET),
        ("GET", f"{POET}/history"),
    ):
        to.ask("acme", method, path)


def files_and_uploads(to: Session) -> None:
    purpose = (None, "fine-tune")
    made = to.ask("acme", "POST", "/v1/files", files={"file": ("data.jsonl", DATA), "purpose": purpose})
    to.ids["file"] = made.json()["id"]
    whole = {"filename": "parts.jsonl", "purpose": "fine-tune", "bytes": len(DATA), "mime_type": "text/plain"}
    first, second = (to.ask("acme", "POST", "/v1/uploads", json=whole).json()["id"] for _ in range(2))
    sent = [
        to.ask("acme", "POST", f"/v1/uploads/{first}/parts", files={"data": part}).json()["id"]
        for part in (DATA[:50], DATA[50:])
    ]
    complete = f"/v1/uploads/{first}/complete"
    to.ask("acme", "POST", complete, json={"part_ids": sent[:1]})
    joined = to.ask("acme", "POST", complete, json={"part_ids": sent}).json()["file"]["id"]
    to.ask("acme", "POST", complete, json={"part_ids": sent})
    to.ask("acme", "POST", f"/v1/uploads/{second}/cancel")
    to.ask("acme", "POST", f"/v1/uploads/{second}/parts", files={"data": DATA})
    for path in ("", "?limit=1&order=asc", "?purpose=other", f"/{joined}", f"/{joined}/content"):
        to.ask("acme", "GET", f"/v1/files{path}")
    to.ask("zeta", "GET", f"/v1/files/{joined}")
    to.ask("acme", "DELETE", f"/v1/files/{joined}")


def jobs(to: Session) -> None:
    """The second waits for the worker, which the first one has, until it is cancelled."""
    asked: dict[str, Any] = {
        "model": BASE,
        "training_file": to.ids["file"],
        "seed": 1,
        "hyperparameters": {"n_epochs": 1, "batch_size": 3},
        "peft": {"type": "prompt", "num_virtual_tokens": 1, "eval_share": 0.25, "publish": "always"},
        "suffix": "trained",
        "metadata": {"season": "autumn"},
    }
    key = {"idempotency-key": "once"}
    first = to.ask("acme", "POST", JOBS, json=asked, headers=key).json()["id"]
    lora = {"suffix": None, "peft": {"type": "lora", "r": 2, "target_modules": ["q_proj"]}, "metadata": None}
    second = to.ask("acme", "POST", JOBS, json=asked | lora).json()["id"]
    to.ask("acme", "POST", JOBS, json=asked | lora, headers=key)  # that key was used for another
    to.ask("acme", "DELETE", f"/v1/files/{to.ids['file']}")
    for what in ("pause", "resume", "cancel", "pause"):
        to.ask("acme", "POST", f"{JOBS}/{second}/{what}")
    with client(to.url, to.keys["acme"]) as http:
        wait_for_jobs(http, [first, second])
    for path in ("", "?limit=1", "?metadata[season]=autumn", "?metadata=null"):
        to.ask("acme", "GET", JOBS + path)
    for path in ("", "/events?limit=100", "/events?stream=true", "/events?limit=1", "/checkpoints"):
        to.ask("acme", "GET", f"{JOBS}/{first}{path}")
    results = to.ask("acme", "GET", f"{JOBS}/{first}").json()["result_files"]
    to.ask("acme", "GET", f"/v1/files/{results[1]}/content")
    to.ask("acme", "GET", "/v1/adapters/trained")
    to.complete(model="trained")


def operating(to: Session) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/"):
        to.ask("nobody", "GET", path)
    to.ask("acme", "GET", "/v1/limits")
    tenant = f"/admin/tenants/{to.ids['zeta']}"
    to.ask("operator", "POST", "/admin/tenants", json={"name": "third", "weight": 2.5})
    to.ask("operator", "GET", "/admin/tenants")
    to.ask("operator", "GET", tenant)
    key = to.ask("operator", "POST", f"{tenant}/keys").json()["id"]
    to.ask("operator", "GET", f"{tenant}/keys")
    to.ask("operator", "DELETE", f"{tenant}/keys/{key}")
    to.ask("operator", "POST", f"{tenant}/adapters", data={"name": "given"}, files=form(adapters.lora(3)))
    to.ask("operator", "POST", "/admin/gc", json={"dry_run": True})
    to.ask("operator", "POST", "/admin/gc", json={})
    to.ask("operator", "POST", "/admin/rebuild-index")
    to.ask("operator", "POST", "/admin/verify")
    for body in ({"lora_path": "poet"}, {"lora_path": "poet"}, {"lora_path": "poet", "load_inplace": True}):
        to.ask("operator", "POST", "/v1/load_lora_adapter", json=body | {"lora_name": "loaded"})
    to.complete("operator", model="loaded")
    for _ in range(2):
        to.ask("operator", "POST", "/v1/unload_lora_adapter", json={"lora_name": "loaded"})
