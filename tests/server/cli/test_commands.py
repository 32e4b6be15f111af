"""The command line against a real server with a fake engine: what it sends, what it prints, how it fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from redis import Redis as SyncRedis
from transformers import PreTrainedTokenizerFast

from server import __version__
from server.cli.commands.serve import INTERNAL
from server.cli.http_client import pages
from server.cli.main import SUMMARIES, load_command
from server.cli.options import read_settings
from server.engine.fake import Behaviour
from server.engine.model.config_shapes import read_shapes
from server.errors import StartupError
from server.settings import Settings
from tests.fixtures.hub import hub
from tests.fixtures.models import build_tiny
from tests.server.api.conftest import System, lora_files
from tests.server.cli.conftest import Done, Run


def script(system: System, text: str) -> Behaviour:
    """The engine answers every prompt with `text`."""
    ids: list[int] = PreTrainedTokenizerFast.from_pretrained(system.settings.model).encode(text)
    return Behaviour(script=ids)


def prompts(system: System) -> list[str]:
    """What the engine was asked since the last call, as text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(system.settings.model)
    seen = [tokenizer.decode(row.prompt) for row in system.engine.seen]
    system.engine.seen.clear()
    return seen


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder as a training run leaves it: the adapter's files, and others."""
    for _, (name, content, _) in lora_files():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"\x80pickle")
    return tmp_path


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")


def test_usage_of_one_tenant_and_of_all(run: Run, system: System) -> None:
    made = dict(line.split() for line in run("tenants", "add", "thrifty").out.splitlines())
    assert run("usage", "--key", made["key"]) == (0, "", "")
    with system.http(made["key"]) as client:
        asked = {"model": "toy", "prompt": "hello", "max_tokens": 3}
        assert client.post("/v1/completions", json=asked).status_code == 200
    [line] = run("usage", "--key", made["key"], "--by", "adapter").out.splitlines()
    _, tenant, adapter, key, requests, _, _, generated, *_ = line.split("\t")
    assert (tenant, adapter, key, requests, generated) == ("", "toy", "", "1", "3")
    lines = run("usage", "--by", "tenant", "--csv", "--start", "2026-01-01").out.splitlines()
    assert lines[0].startswith("date,tenant,adapter,key,requests,")
    assert sum(made["id"] in line for line in lines) == 1
    assert sum(line == lines[0] for line in lines) == 1
    assert run("usage", "--start", "soon").status == 1


def test_a_tenant_is_made_and_its_key_works_until_revoked(run: Run) -> None:
    made = dict(line.split() for line in run("tenants", "add", "acme").out.splitlines())
    assert f"{made['id']}\tacme" in run("tenants", "list").out.splitlines()
    assert run("adapters", "list", "--key", made["key"]) == (0, "", "")

    [key_id] = run("tenants", "keys", made["id"]).out.split()
    assert run("tenants", "revoke", made["id"], key_id).out == f"{key_id} is revoked.\n"
    refused = run("adapters", "list", "--key", made["key"])
    assert (refused.status, refused.out, refused.err) == (1, "", "The API key is not valid.\n")


def test_a_tenant_gets_a_second_key(run: Run, system: System) -> None:
    tenant = run("tenants", "add", "two keys").out.split()[1]
    made = dict(line.split() for line in run("tenants", "keys", tenant, "--new").out.splitlines())
    assert len(run("tenants", "keys", tenant).out.split()) == 2
    assert run("adapters", "list", "--key", made["secret"]).status == 0


def test_keys_have_terms_and_are_rotated(run: Run) -> None:
    tenant = run("tenants", "add", "with keys").out.split()[1]
    terms = ("--name", "CI", "--scope", "read", "--scope", "adapters", "--expires-in", "30d")
    made = dict(line.split() for line in run("tenants", "keys", tenant, "--new", *terms).out.splitlines())
    assert run("adapters", "list", "--key", made["secret"]).status == 0
    lines = run("keys", "list", "--tenant", tenant).out.splitlines()
    [line] = [line for line in lines if line.startswith(made["id"])]
    id_, name, scopes, expires, last_used, addresses = line.split("\t")
    assert (id_, name, scopes, last_used, addresses) == (made["id"], "CI", "adapters,read", "-", "-")
    assert expires.startswith("20")

    rotated = dict(
        line.split() for line in run("tenants", "rotate", tenant, id_, "--overlap", "0s").out.splitlines()
    )
    assert run("adapters", "list", "--key", made["secret"]).status == 1
    assert run("adapters", "list", "--key", rotated["secret"]).status == 0
    refused = run("keys", "new", "--key", rotated["secret"])
    assert "takes a key with all scopes" in refused.err
    wrong = run("tenants", "rotate", tenant, id_, "--overlap", "soon")
    assert "--overlap must be a time such as 30d, 12h, 10m or 60s" in wrong.err
    assert "are for --new" in run("tenants", "keys", tenant, "--name", "x").err


def test_a_tenant_manages_its_own_keys(run: Run) -> None:
    own = ("--key", run("tenants", "add", "own keys").out.split()[3])
    made = dict(
        line.split() for line in run("keys", "new", "--address", "127.0.0.0/8", *own).out.splitlines()
    )
    assert made["id"] in run("keys", "list", *own).out
    assert run("keys", "rotate", made["id"], *own).out.startswith(f"id      {made['id']}\nsecret  pp-")
    assert run("keys", "revoke", made["id"], *own).out == f"{made['id']} is revoked.\n"
    assert run("keys", "list", "--tenant", "operator").out.split("\t")[:2] == ["operator", "admin.key"]


def test_the_audit_log_is_shown_and_exported(run: Run) -> None:
    tenant, secret = run("tenants", "add", "audited").out.split()[1::2]
    run("keys", "new", "--name", "second", "--key", secret)
    rows = [line.split("\t") for line in run("audit", "--tenant", tenant).out.splitlines()]
    assert [(row[1], row[3], row[5]) for row in rows] == [
        (tenant, "key.create", "done"),
        (tenant, "tenant.create", "done"),
    ]
    own = run("audit", "--own", "--key", secret, "--format", "jsonl", "--action", "key.").out
    assert [json.loads(line)["details"]["name"] for line in own.splitlines()] == ["second"]
    table = run("audit", "--since", "1h", "--outcome", "done", "--format", "csv").out.splitlines()
    assert table[0].startswith("id,time,tenant,actor")
    assert len(table) > 2
    assert run("audit", "--outcome", "good").status == 1
    assert run("audit", "--format", "csv", "--key", secret).err == "This route needs the operator's key.\n"


def test_a_tenants_limits_are_shown_and_changed(run: Run) -> None:
    tenant = run("tenants", "add", "limited").out.split()[1]

    def shown(*options: str) -> dict[str, str]:
        lines = run("tenants", "limits", tenant, *options).out.splitlines()
        return {name: f"{own} {in_force}" for name, own, in_force in (line.split("\t") for line in lines)}

    assert shown()["requests_per_minute"] == "default none"
    assert shown("--requests-per-minute", "60", "--max-n", "2")["requests_per_minute"] == "60 60"
    changed = shown("--requests-per-minute", "default", "--tokens-per-minute", "500")
    assert changed == shown()
    assert {name: changed[name] for name in ("requests_per_minute", "tokens_per_minute", "max_n")} == {
        "requests_per_minute": "default none",
        "tokens_per_minute": "500 500",
        "max_n": "2 2",
    }
    for value, said in (("0", "greater than or equal to 1, not 0"), ("many", "a whole number or `default`")):
        refused = run("tenants", "limits", tenant, "--tokens-per-minute", value)
        assert refused.status != 0
        assert said in " ".join(refused.err.split())
    assert shown("--priority", "batch", "--jobs", "0")["priority"] == "batch batch"
    refused = run("tenants", "limits", tenant, "--priority", "urgent")
    assert "priority should be 'interactive', 'standard' or 'batch', not 'urgent'." in refused.err
    [key_id] = run("tenants", "keys", tenant).out.split()
    of_key = run("tenants", "limits", tenant, "--key-id", key_id, "--tokens-per-minute", "900").out
    assert "tokens_per_minute\t900\t500" in of_key  # the tenant's is tighter
    assert "jobs" not in of_key
    assert run("tenants", "limits", tenant, "--adapter", "none").err.startswith("The model 'none' does not")
    assert run("tenants", "limits", tenant, "--key-id", "key_none").err == "There is no key 'key_none'.\n"
    assert run("tenants", "limits", "ten_none").err == "There is no tenant 'ten_none'.\n"


def test_an_adapter_is_pushed_listed_shown_and_removed(run: Run, system: System, adapter: Path) -> None:
    key = ("--key", system.tenant("pusher"))
    pushed = run("adapters", "push", "poet", str(adapter), *key)
    assert pushed.status == 0, pushed.err
    made = json.loads(pushed.out)
    assert made["version"] == 1
    assert [one["file"] for one in made["ignored"]] == ["tokenizer.json"], "what changes prompts, no more"
    # the weights' file alone finds its config beside it
    assert json.loads(run("adapters", "push", "poet", str(adapter / "adapter_model.safetensors"), *key).out)
    name, version, method, rank, _ = run("adapters", "list", *key).out.strip().split("\t")
    assert (name, version, method, rank) == ("poet", "2", "lora", "4")
    assert len(json.loads(run("adapters", "show", "poet", *key).out)["versions"]) == 2
    assert run("adapters", "rm", "poet", *key).out == "poet is deleted.\n"
    assert run("adapters", "show", "poet", *key).status == 1


def test_a_lost_index_is_rebuilt_from_the_manifests(run: Run, system: System, adapter: Path) -> None:
    key = system.tenant("lost")
    for _ in range(2):
        assert run("adapters", "push", "poet", str(adapter), "--key", key).status == 0
    with SyncRedis.from_url(system.settings.redis_url or "") as redis:
        redis.delete(*redis.keys("pp:adapter*"))
    assert run("adapters", "show", "poet", "--key", key).status == 1
    assert run("admin", "rebuild-index", "--key", key).status == 1  # a tenant's
    assert "index holds" in run("admin", "rebuild-index").out
    shown = json.loads(run("adapters", "show", "poet", "--key", key).out)
    assert [version["version"] for version in shown["versions"]] == [1, 2]


def test_an_alias_is_pointed_split_rolled_back_and_forgotten(run: Run, system: System, adapter: Path) -> None:
    key = ("--key", system.tenant("pointer"))
    for _ in range(2):
        run("adapters", "push", "poet", str(adapter), *key)
    assert run("adapters", "alias", "poet", "prod", "v1", *key).out == "poet@prod -> 1\n"
    split = run("adapters", "alias", "poet", "prod", "1=0.9,2=0.1", *key)
    assert split.out == "poet@prod -> 1=0.9,2=0.1\n"
    assert run("adapters", "alias", "poet", "prod", *key).out == split.out
    assert run("adapters", "rollback", "poet", "prod", *key).out == "poet@prod -> 1\n"
    assert run("adapters", "rollback", "poet", *key).out == "poet@latest -> 1\n"
    assert run("adapters", "alias", "poet", "prod", "--delete", *key).out == "poet@prod is forgotten.\n"
    for nonsense in ("x", "1=", "1=0.9;2=0.1", "=1"):
        assert run("adapters", "alias", "poet", "prod", nonsense, *key).status == 1
    history = [line.split("\t")[2:] for line in run("adapters", "history", "poet", *key).out.splitlines()]
    assert history == [
        ["unalias", "prod: 1 -> -"],
        ["rollback", "latest: 2 -> 1"],
        ["rollback", "prod: 1=0.9,2=0.1 -> 1"],
        ["alias", "prod: 1 -> 1=0.9,2=0.1"],
        ["alias", "prod: - -> 1"],
        ["publish", "+2; latest: 1 -> 2"],
        ["publish", "+1; latest: - -> 1"],
    ]


def test_what_is_removed_is_listed_and_restored_until_it_is_purged(
    run: Run, system: System, adapter: Path
) -> None:
    key = ("--key", system.tenant("remover"))
    for _ in range(2):
        run("adapters", "push", "poet", str(adapter), *key)
    assert run("adapters", "rm", "poet@1", *key).out == "poet@1 is deleted.\n"
    assert run("adapters", "rm", "poet", *key).out == "poet is deleted.\n"
    listed = [line.split("\t")[:2] for line in run("adapters", "list", "--deleted", *key).out.splitlines()]
    assert listed == [["poet", "1"], ["poet", "2"]]
    assert run("adapters", "restore", "poet", "--version", "1", *key).out == "poet has 1 versions.\n"
    assert run("adapters", "restore", "poet", *key).out == "poet has 2 versions.\n"
    assert run("adapters", "rm", "poet", "--purge", *key).out == "poet is purged.\n"
    assert run("adapters", "restore", "poet", *key).status == 1


def test_garbage_is_named_and_removed_and_a_whole_store_verified(
    run: Run, system: System, adapter: Path
) -> None:
    services = system.app.state.services
    run("adapters", "push", "kept", str(adapter), "--key", system.tenant("keeper"))
    stray = "tenants/operator/blobs/stray"
    services.objects.put_sync(stray, b"xyz")
    collector = services.registry.collector
    grace, collector._grace = collector._grace, -1
    try:
        for option, verb in (["--dry-run"], "would be removed"), ([], "are removed"):
            done = run("admin", "gc", *option)
            assert stray in done.out
            assert f"{verb}." in done.out.splitlines()[-1]
    finally:
        collector._grace = grace
    assert run("admin", "verify").status == 0
    blob = next(key for key in services.objects.list_sync("tenants") if "/blobs/" in key)
    whole = services.objects.get_sync(blob)
    services.objects.put_sync(blob, whole[:-1])
    damaged = run("admin", "verify")
    services.objects.put_sync(blob, whole)
    assert (damaged.status, damaged.out.split("\t")[0]) == (1, "corrupt")
    assert damaged.err.endswith("1 objects that versions need are missing or corrupt.\n")
    assert run("admin", "verify", "--key", system.tenant("curious")).status == 1


def test_the_operator_imports_from_the_hub_what_is_safe(system: System, adapter: Path) -> None:
    """In a process of its own: huggingface_hub reads where the hub is once."""
    with system.http(system.operator) as operator:
        tenant = operator.post("/admin/tenants", json={"name": "importer"}).json()
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    other = {
        "adapter_model.bin": b"\x80pickle",
        "checkpoint-1/adapter_model.safetensors": b"x",
        "run.py": b"",
    }
    pickled = {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80pickle"}
    with hub({"someone/poet": files | other, "someone/pickled": pickled}) as fake:
        variables = {"HF_ENDPOINT": fake.url, "POLYPEFT_URL": system.url, "HF_HUB_OFFLINE": "0"}
        variables["POLYPEFT_DATA_DIR"] = str(system.settings.data_dir)

        def import_(model: str) -> Done:
            arguments = ["admin", "import", model, "--tenant", tenant["id"], "--name", "poet"]
            code = "from server.cli.main import main; main()"
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                env=os.environ | variables | {"PYTHONPATH": str(Path.cwd())},
                capture_output=True,
                text=True,
                check=False,
            )
            return Done(done.returncode, done.stdout, done.stderr)

        made = import_("someone/poet@v1")
        assert made.status == 0, made.err
        assert sorted(fake.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
        assert "v1" in fake.revisions
        refused = import_("someone/pickled")
        assert (refused.status, "a pickle is not fetched" in refused.err) == (1, True)
        assert "adapter_model.bin" not in fake.fetched
        for model, said in ("someone/nothing", "could not be fetched"), ("../poet", "is no hub id"):
            refused = import_(model)
            assert (refused.status, said in refused.err) == (1, True), refused.err
    with system.http(tenant["key"]) as client:
        assert client.get("/v1/adapters/poet").json()["version"] == 1
        (change,) = client.get("/v1/adapters/poet/history").json()["data"]
        assert change["actor"] == "operator"


def test_every_page_is_listed() -> None:
    def paged(request: httpx.Request) -> httpx.Response:
        after = request.url.params.get("after", "")
        names = [name for name in ("a", "b", "c") if name > after][:2]
        page = {
            "data": [{"name": name} for name in names],
            "has_more": names[-1] != "c",
            "last_id": names[-1],
        }
        return httpx.Response(200, json=page)

    with httpx.Client(transport=httpx.MockTransport(paged), base_url="http://server") as client:
        assert [adapter["name"] for adapter in pages(client, "/v1/adapters")] == ["a", "b", "c"]


def test_the_servers_refusal_is_one_sentence(run: Run, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    refused = run("adapters", "push", "bad", str(adapter))
    assert refused.status == 1
    assert refused.out == ""
    assert "ADALORA" in refused.err.splitlines()[-1]
    assert "Traceback" not in refused.err


def test_a_folder_without_an_adapter_is_refused_before_anything_is_sent(run: Run, tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"\x80pickle")
    refused = run("adapters", "push", "bad", str(tmp_path))
    assert (refused.status, "holds no adapter_config.json" in refused.err) == (1, True)


def test_chat_streams_and_remembers_over_a_pipe(run: Run, system: System) -> None:
    system.engine.behaviour = script(system, "fine")
    prompts(system)
    said = run("chat", "--temperature", "0", "--system", "be kind", stdin="how are you\n\nreally\n")
    assert said == (0, "fine\nfine\n", "")
    first = "<|system|>be kind<|end|><|user|>how are you<|end|><|assistant|>"
    assert prompts(system) == [first, first + "fine<|end|><|user|>really<|end|><|assistant|>"]


def test_chat_names_its_adapter(run: Run, system: System, adapter: Path) -> None:
    run("adapters", "push", "poet", str(adapter))
    system.engine.seen.clear()
    assert run("chat", "--adapter", "poet", "--max-tokens", "3", stdin="hi\n").status == 0
    assert [row.adapter.name for row in system.engine.seen if row.adapter] == ["poet"]
    unknown = run("chat", "--adapter", "nobody", stdin="hi\n")
    assert (unknown.status, unknown.out) == (1, "")
    assert "`nobody` does not exist" in unknown.err


def test_an_answer_that_fails_midway_says_so(run: Run, system: System, adapter: Path) -> None:
    digest = json.loads(run("adapters", "push", "broken", str(adapter)).out)["digest"]
    system.engine.behaviour = Behaviour(fail_digest=digest, fail_after=2)
    failed = run("chat", "--adapter", "broken", stdin="hi\n")
    assert (failed.status, failed.err) == (1, "The adapter produced a value that is not finite.\n")


def test_a_model_cannot_steer_the_terminal(run: Run, system: System) -> None:
    system.engine.behaviour = script(system, "a\x1b[2Jb")
    assert run("chat", stdin="hi\n").out == "a\\x1b[2Jb\n"


def test_a_server_that_is_not_there_is_a_sentence(run: Run) -> None:
    failed = run("tenants", "list", "--url", "http://127.0.0.1:1")
    assert failed.status == 1
    assert failed.err.startswith("The server at http://127.0.0.1:1 cannot be reached")


def test_without_a_key_it_says_where_one_was_looked_for(run: Run, tmp_path: Path) -> None:
    failed = run("tenants", "list", "--data-dir", str(tmp_path))
    assert failed.status == 1
    assert "admin.key" in failed.err


def test_the_operators_key_is_found_where_the_server_finds_it(
    run: Run, system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of POLYPEFT_ADMIN_KEY_FILE; a --data-dir that is given goes before it."""
    (tmp_path / "shared").write_text(system.operator + "\n")
    monkeypatch.setenv("POLYPEFT_DATA_DIR", str(tmp_path / "none"))
    assert run("tenants", "list").status == 1
    monkeypatch.setenv("POLYPEFT_ADMIN_KEY_FILE", str(tmp_path / "shared"))
    assert run("tenants", "list").status == 0
    (tmp_path / "shared").write_text("wrong")
    assert run("tenants", "list").status == 1
    assert run("tenants", "list", "--data-dir", str(system.settings.data_dir)).status == 0


def test_every_setting_is_an_option_with_its_help(run: Run) -> None:
    shown = run("serve", "--help").out.replace("\n", " ")
    for name in Settings.model_fields.keys() - INTERNAL:
        flag = "--" + name.replace("_", "-")
        assert flag in shown or flag[:14] in shown  # a narrow terminal cuts long ones
    assert "supervisor" not in shown


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", "99999"), ("--device", "tpu"), ("--kv-bytes", "many"), ("--max-seqs", "0")],
)
def test_a_bad_option_is_refused_by_name_and_value(option: str, value: str, run: Run) -> None:
    refused = run("serve", option, value)
    assert refused.status == 1
    assert refused.err.startswith(f"{option} '{value}': ")
    assert len(refused.err.splitlines()) == 1


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYPEFT_PORT", "1111")
    monkeypatch.setenv("POLYPEFT_MAX_SEQS", "3")
    settings = read_settings({"port": "2222", "prefix_cache": False, "store": None})
    assert (settings.port, settings.max_seqs, settings.prefix_cache) == (2222, 3, False)
    monkeypatch.setenv("POLYPEFT_PORT", "none")
    with pytest.raises(StartupError, match="--port 'none'"):
        read_settings({})


def test_the_command_line_starts_without_torch() -> None:
    heavy = {"torch", "transformers", "fastapi"}
    load_all = "[server.cli.main.load_command(name) for name in server.cli.main.SUMMARIES]"
    code = f"import sys, server.cli.main; {load_all}; sys.exit(bool({heavy} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())})


def test_help_lists_the_commands_without_loading_one() -> None:
    code = """
import json, sys
from server.cli.main import app
sys.argv = ["polypeft", "--help"]
app(standalone_mode=False)
print(json.dumps(list(sys.modules)), file=sys.stderr)
"""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    loaded = set(json.loads(done.stderr))
    assert not loaded & {"httpx", "huggingface_hub", "msgspec", "pydantic", "server.settings"}
    assert not loaded & {f"server.cli.commands.{name}" for name in SUMMARIES}
    for name in SUMMARIES:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_command_is_listed_by_the_first_paragraph_of_its_help(name: str) -> None:
    help_text = load_command(name).help or ""
    assert SUMMARIES[name] == help_text.partition("\n\n")[0].replace("\n", " ")


def test_a_text_is_completed_as_it_stands(run: Run, system: System) -> None:
    system.engine.behaviour = script(system, " fine")
    prompts(system)
    assert run("complete", "Word: good\nSentiment:") == (0, " fine\n", "")
    assert run("complete", stdin="a line\n") == (0, " fine\n", "")
    assert prompts(system) == ["Word: good\nSentiment:", "a line"]
    assert run("complete", "x", "--adapter", "nobody").status == 1


def test_size_tells_bytes_and_the_options_that_go_with_them(run: Run, tmp_path: Path) -> None:
    build_tiny("llama", tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink()  # config.json is all it reads
    done = run(
        "size", "--model", str(tmp_path / "tiny"), "--adapters", "10", "--rank", "4", "--context", "64"
    )
    assert done.status == 0, done.err
    rows = {line.split("\t")[0]: int(line.split("\t")[1]) for line in done.out.splitlines() if "\t" in line}
    assert rows["KV cache"] == 32 * 4 * 16 * (2 * 2 * 2 * 16 * 4)  # rows, blocks, tokens, bytes of a token
    assert rows["adapters in slots"] == 10 * 4 * 2 * 928 * 4  # rank, layers, in + out of 7 linears
    assert rows["adapters in RAM"] == 0
    in_memory = {"weights", "KV cache", "adapters in slots", "adapters in RAM"}
    assert rows["host, together"] >= sum(rows[part] for part in in_memory)
    options = done.err.split("polypeft serve ")[1].split()
    told = dict(zip(options[::2], options[1::2], strict=True))
    settings = read_settings({name[2:].replace("-", "_"): value for name, value in told.items()})
    assert settings.kv_bytes == max(rows["KV cache"], 1 << 20)
    assert settings.adapter_slots == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "nowhere"), "--model 'nowhere' is neither"),
        (("--model", "."), "--model '.' cannot be sized: "),
    ],
)
def test_size_of_what_cannot_be(run: Run, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    build_tiny("llama", tmp_path / "tiny")
    done = run("size", "--model", str(tmp_path / "tiny"), *arguments)
    assert done.status == 1
    assert sentence in done.err


def test_size_of_a_context_that_the_model_does_not_have(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the child that reads config.json for it: this process has torch."""
    build_tiny("llama", tmp_path / "tiny")
    shapes = read_shapes(tmp_path / "tiny")
    monkeypatch.setattr("server.cli.commands.size.shapes_of", lambda settings: shapes)
    done = run("size", "--model", str(tmp_path / "tiny"), "--context", "513")
    assert done.status == 1
    assert "--context 513 is more than 512, the model's own." in done.err
