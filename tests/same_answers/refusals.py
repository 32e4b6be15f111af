"""Requests that are refused, of every kind: what is said, with which status, code and field."""

import json
from typing import Any

from tests.same_answers import adapters
from tests.same_answers.adapters import CONFIG, WEIGHTS, form
from tests.same_answers.requests import DATA, JOBS, POET
from tests.same_answers.session import BASE, PROMPT, Session

GENERATION: tuple[dict[str, Any], ...] = (
    {"model": "nobody"},
    {"model": "lora@99"},
    {"model": "lora@nowhere"},
    {"model": f"ft:{BASE}:lora:99"},
    {"model": 5},
    {"max_tokens": -1},
    {"max_tokens": "8"},
    {"max_tokens": 10**6},
    {"temperature": 2.5},
    {"temperature": "hot"},
    {"top_p": 0},
    {"top_k": -2},
    {"min_p": 2},
    {"n": 0},
    {"n": 99},
    {"presence_penalty": 3},
    {"repetition_penalty": 0},
    {"seed": 2**70},
    {"stop": [""]},
    {"stop": ["a"] * 9},
    {"stop": "a" * 300},
    {"stop_token_ids": [1] * 9},
    {"logit_bias": {"7": 101}},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"99999999": 1}},
    {"stream_options": {"include_usage": True}},
    {"user": 5},
    {"metadata": {"": "x"}},
    {"metadata": {str(number): "x" for number in range(17)}},
    {"store": True},
    {"chat_template": "{{ x }}"},
    {"unknown": 1},
    {"adapters": [{"name": "lora"}] * 5},
    {"adapters": [{"name": "nobody"}]},
    {"adapters": [{"name": "lora", "weight": 17}]},
    {"adapters": [{"name": "prefix"}, {"name": "prompt"}]},
    {"adapters": [{"name": "bottleneck"}, {"name": "lora"}]},
    {"model": "lora", "adapters": [{"name": "lora"}]},
)
COMPLETIONS: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"prompt": None},
    {"prompt": []},
    {"prompt": 5},
    {"prompt": [PROMPT] * 17},
    {"prompt": [10**9]},
    {"prompt": [1] * 5000},
    {"prompt": "word " * 5000},
    {"suffix": "x"},
    {"best_of": 2},
    {"prompt_logprobs": 21},
    {"prompt_logprobs": 1, "stream": True},
    {"logprobs": 21},
)
CHAT: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": None},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
    {"messages": [{"role": "user", "content": "x"}] * 2049},
    {"messages": [{"role": "user", "content": "word " * 5000}]},
    {"tools": [{"type": "function"}]},
    {"reasoning_effort": "low"},
    {"top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 21},
    {"max_tokens": 5, "max_completion_tokens": 6},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "text", "schema": {}}},
    {"response_format": {"type": "json_object", "schema": {"type": "nonsense"}}},
    {"response_format": {"type": "json_object", "schema": {"$ref": "http://x/y"}}},
)
# who, method, path, request
ROUTES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("nobody", "GET", "/v1/models", {}),
    ("stranger", "GET", "/v1/models", {}),
    ("nobody", "GET", "/metrics", {}),
    ("acme", "GET", "/admin/tenants", {}),
    ("acme", "POST", "/v1/load_lora_adapter", {"json": {"lora_name": "x", "lora_path": "poet"}}),
    ("acme", "GET", "/v1/nowhere", {}),
    ("acme", "PUT", "/v1/completions", {}),
    ("acme", "GET", "/v1/models/nobody", {}),
    ("acme", "DELETE", f"/v1/models/{BASE}", {}),
    ("acme", "POST", "/v1/completions", {"content": b"{"}),
    ("acme", "POST", "/v1/completions", {"content": b"[]"}),
    ("acme", "POST", "/v1/completions", {"content": b"\xff"}),
    ("acme", "POST", "/v1/completions", {"content": b'{"model":"a","model":"b"}'}),
    ("acme", "POST", "/v1/completions", {"content": b'{"n":' + b"[" * 200 + b"]" * 200 + b"}"}),
    ("acme", "POST", "/v1/completions", {"content": b'{"n":[' + b"[]," * 20_000 + b"1]}"}),
    ("acme", "POST", "/v1/completions", {"content": b'{"n":NaN}'}),
    ("acme", "POST", "/v1/completions", {"content": b" " * (5 << 20)}),
    ("acme", "POST", "/v1/completions", {"data": {"model": BASE}}),
    ("acme", "POST", "/v1/completions", {"content": b"{}", "headers": {"content-encoding": "gzip"}}),
    ("acme", "GET", "/v1/adapters?limit=0", {}),
    ("acme", "GET", "/v1/adapters?limit=many", {}),
    ("acme", "GET", "/v1/adapters?deleted=perhaps", {}),
    ("acme", "GET", "/v1/adapters/nobody", {}),
    ("zeta", "GET", "/v1/adapters/bitfit", {}),
    ("acme", "DELETE", f"{POET}?purge=maybe", {}),
    ("acme", "DELETE", POET, {"headers": {"if-match": '"other"'}}),
    ("acme", "DELETE", f"{POET}/versions/99", {}),
    ("acme", "GET", f"{POET}/versions/1/download?file=passwd", {}),
    ("acme", "POST", f"{POET}/restore", {}),
    ("acme", "POST", f"{POET}/restore?version=x", {}),
    ("acme", "GET", f"{POET}/aliases/nowhere", {}),
    ("acme", "DELETE", f"{POET}/aliases/nowhere", {}),
    ("acme", "POST", f"{POET}/aliases/latest/rollback", {}),
    ("acme", "POST", f"{POET}/aliases", {"json": {"alias": "live"}}),
    ("acme", "POST", f"{POET}/aliases", {"json": {"alias": "5", "version": 1}}),
    ("acme", "POST", f"{POET}/aliases", {"json": {"alias": "a b", "version": 1}}),
    ("acme", "POST", f"{POET}/aliases", {"json": {"alias": "live", "version": 99}}),
    ("acme", "POST", f"{POET}/aliases", {"json": {"alias": "live", "weights": {}}}),
    ("acme", "POST", f"{POET}/aliases", {"json": {"alias": "live", "weights": {"1": -1}}}),
    ("acme", "POST", f"{POET}/aliases", {"json": {"alias": "latest", "weights": {"1": 1, "2": 1}}}),
    ("acme", "POST", "/v1/adapters/nobody/pin", {}),
    ("acme", "POST", "/v1/adapter_uploads", {"json": {"name": "x", "files": [{"name": CONFIG, "bytes": 5}]}}),
    ("acme", "GET", "/v1/adapter_uploads/nothing", {}),
    ("acme", "GET", "/v1/files/file-nothing", {}),
    ("acme", "GET", "/v1/files?limit=0", {}),
    ("acme", "GET", "/v1/files?order=up", {}),
    ("acme", "GET", "/v1/files?after=nothing", {}),
    ("acme", "POST", "/v1/files", {"files": {"purpose": (None, "fine-tune")}}),
    ("acme", "POST", "/v1/files", {"files": {"file": ("a.jsonl", DATA), "purpose": (None, "vision")}}),
    ("acme", "POST", "/v1/files", {"files": {"file": ("a.jsonl", b""), "purpose": (None, "fine-tune")}}),
    ("acme", "POST", "/v1/uploads", {"json": {"bytes": 0, "filename": "a", "mime_type": "", "purpose": "x"}}),
    ("acme", "POST", "/v1/uploads/upload_nothing/complete", {"json": {"part_ids": ["x"]}}),
    ("acme", "GET", f"{JOBS}/ftjob-nothing", {}),
    ("acme", "GET", f"{JOBS}?limit=101", {}),
    ("operator", "GET", "/admin/tenants/nobody", {}),
    ("operator", "POST", "/admin/tenants", {"json": {"name": ""}}),
    ("operator", "POST", "/admin/tenants", {"json": {"name": "x", "weight": 0}}),
    ("operator", "POST", "/v1/load_lora_adapter", {"json": {"lora_name": "x", "lora_path": "../.."}}),
    ("operator", "POST", "/v1/load_lora_adapter", {"json": {"lora_name": "x", "lora_path": "."}}),
    ("acme", "GET", "/v1/models?x=" + "y" * 60_000, {}),
    ("acme", "GET", "/v1/models", {"headers": {f"x-{number}": "y" for number in range(300)}}),
)
FILES: dict[str, adapters.Files] = {
    "no files": {},
    "no weights": {CONFIG: adapters.lora(1)[CONFIG]},
    "no config": {WEIGHTS: adapters.lora(1)[WEIGHTS]},
    "config that is no JSON": adapters.lora(1) | {CONFIG: b"{"},
    "config of another library": adapters.lora(1) | {CONFIG: b'{"lora_parameters": {"rank": 1}}'},
    "weights that are none": adapters.lora(1) | {WEIGHTS: b"\x00" * 64},
    "a pickle": {CONFIG: adapters.lora(1)[CONFIG], "adapter_model.bin": b"\x80\x02."},
    "rank": adapters.lora(1, r=2),
    "high rank": adapters.lora(1, r=300),
    "target": adapters.lora(1, target_modules=["nowhere"]),
    "unknown field": adapters.lora(1, future=True),
    "pissa": adapters.lora(1, init_lora_weights="pissa"),
    "peft_type": adapters.lora(1, peft_type="VERA"),
    "task_type": adapters.lora(1, task_type="SEQ_CLS"),
    "not finite": adapters.lora(1, 1e30),
    "changes nothing": adapters.lora(1, 0),
}
TRAINING: tuple[dict[str, Any], ...] = (
    {"model": "nobody"},
    {"training_file": "file-nothing"},
    {"training_file": None},
    {"seed": -1},
    {"suffix": "a b"},
    {"integrations": []},
    {"hyperparameters": {"n_epochs": 0}},
    {"hyperparameters": {"n_epochs": 51}},
    {"hyperparameters": {"epochs": 1}},
    {"method": {"type": "dpo"}},
    {"peft": {"type": "vera"}},
    {"peft": {"type": "lora", "r": 999}},
    {"peft": {"type": "lora", "target_modules": ["nowhere"]}},
    {"peft": {"type": "lora", "num_virtual_tokens": 1}},
    {"peft": {"max_tokens": 10**6}},
    {"peft": {}, "method": {"peft": {"type": "lora"}}},
)
EXAMPLES = (
    b"{}\n",
    b"nonsense\n",
    b'{"text": 5}\n',
    b'{"text": "a"}\n{"prompt": "b"}\n',
    b'{"messages": []}\n',
)


def generation(to: Session) -> None:
    for fields in GENERATION + COMPLETIONS:
        to.complete(**fields)
    for fields in GENERATION + CHAT:
        to.chat(**fields)


def routes(to: Session) -> None:
    for who, method, path, request in ROUTES:
        to.ask(who, method, path, **request)


def uploads_of_adapters(to: Session) -> None:
    for what, files in FILES.items():
        to.write(what)
        to.ask("acme", "POST", "/v1/adapters", data={"name": "refused"}, files=form(files) or None)
    good = form(adapters.lora(1, 4))
    for name in ("", "a b", "latest@1", BASE, "x" * 200):
        to.ask("acme", "POST", "/v1/adapters", data={"name": name}, files=good)
    for fields in ({}, {"name": "x", "sha256": "0" * 64}, {"name": "x", "allow_noop": "perhaps"}, {"x": "y"}):
        to.ask("acme", "POST", "/v1/adapters", data=fields, files=good)
    only = {"if-none-match": "*"}
    to.ask("acme", "POST", "/v1/adapters", data={"name": "lora"}, files=good, headers=only)


def training(to: Session) -> None:
    asked = {"model": BASE, "training_file": to.ids["file"], "suffix": "refused"}
    for fields in TRAINING:
        to.ask("acme", "POST", JOBS, json=asked | fields)
    for lines in EXAMPLES:
        sent = {"file": ("a.jsonl", lines), "purpose": (None, "fine-tune")}
        to.write(json.dumps(lines.decode()))
        file = to.ask("acme", "POST", "/v1/files", files=sent).json()["id"]
        to.ask("acme", "POST", JOBS, json=asked | {"training_file": file})
        to.ask("acme", "DELETE", f"/v1/files/{file}")
