"""`make clients`: runs clients, each in an environment of its own, against a real server, and writes the
table of docs/compatibility.md. Takes minutes and the network, so it is no part of `make test`.

    python -m tests.clients [NAME...] [--write] [--cache FOLDER]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from server.base_model.default_model import ensure_default_model
from server.settings import inherited_environment
from tests.clients.table import write_table
from tests.e2e.serving import Serving
from tests.fixtures.models import CACHE, make_lora

HERE = Path(__file__).parent
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
PATIENCE = "--virtual-time-budget=60000"  # ms, in which the time of requests does not count
SECONDS = 600  # for one client: a model of 135M on whatever cores are left
Results = dict[str, str | None]  # by feature: the fault, None if there was none


@dataclass(frozen=True)
class Client:
    """A client's script, and the packages that it needs; `package` comes first and gives the version."""

    name: str
    script: str
    packages: tuple[str, ...]

    @property
    def node(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = (
    Client("openai (Python)", "openai_sdk.py", ("openai",)),
    Client("openai (Node)", "openai_sdk.mjs", ("openai", "zod")),
    Client("langchain-openai", "langchain_openai_.py", ("langchain-openai",)),
    Client("LlamaIndex", "llama_index_.py", ("llama-index-llms-openai-like",)),
    Client("pydantic-ai", "pydantic_ai_.py", ("pydantic-ai-slim[openai]",)),
    Client("instructor", "instructor_.py", ("instructor",)),
    Client("litellm", "litellm_.py", ("litellm",)),
    Client("llm", "llm_.py", ("llm",)),
    Client("Vercel AI SDK", "ai_sdk.mjs", ("ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "zod")),
    Client("DSPy", "dspy_.py", ("dspy",)),
    Client("openai-agents", "openai_agents.py", ("openai-agents",)),
)
PAGE = "a page of another origin"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.clients")
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md")
    parser.add_argument("--cache", type=Path, default=Path(".cache/clients").absolute())
    given = parser.parse_args()
    chosen = [client for client in CLIENTS if not given.names or client.name in given.names]
    rows: dict[str, Results] = {}
    with serving() as environment:
        for client in chosen:
            rows[f"{client.name} {installed(client, given.cache)}"] = run(client, given.cache, environment)
        if not given.names or PAGE in given.names:
            rows |= in_a_browser(environment)
    for name, results in rows.items():
        for feature, fault in results.items():
            sys.stdout.write(f"{name}: {feature}: {fault or 'ok'}\n")
    if given.write:
        write_table(rows)


@contextmanager
def serving() -> Iterator[dict[str, str]]:
    """A server with the default model and one adapter; how a script reaches it."""
    folder = Path(tempfile.mkdtemp(prefix="clients"))
    model = ensure_default_model(CACHE)
    server = Serving(str(model), folder, "--allowed-origins", "*")
    try:
        with server:
            key = server.tenant("clients")
            # weak, so that its JSON ends like the base's
            adapter = make_lora(model, folder / "lora", r=4, scale=0.001, target_modules=["q_proj", "v_proj"])
            files = [("files", (path.name, path.read_bytes())) for path in adapter.glob("adapter_*")]
            with server.http(key) as http:
                http.post("/v1/adapters", data={"name": "poet"}, files=files).raise_for_status()
            yield {
                "POLYPEFT_URL": server.url,
                "POLYPEFT_KEY": key,
                "POLYPEFT_MODEL": model.name,
                "POLYPEFT_ADAPTER": "poet",
            }
    finally:
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


def installed(client: Client, cache: Path) -> str:
    """The version of the client, whose environment is made unless it is there."""
    folder = cache / client.script
    package = client.packages[0].partition("[")[0]
    if client.node:
        if not (folder / "node_modules").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["npm", "install", "--no-fund", "--no-audit", *client.packages], cwd=folder, check=True
            )
        version: str = json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
        return version
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *client.packages], check=True)
        (folder / "installed").touch()
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def run(client: Client, cache: Path, environment: dict[str, str]) -> Results:
    """What the client's script reported."""
    folder = cache / client.script
    if client.node:
        for script in (HERE / "node").glob("*.mjs"):  # beside its node_modules, where Node looks for them
            shutil.copy(script, folder)
        command = ["node", str(folder / client.script)]
    else:
        command = [str(folder / "bin" / "python"), str(HERE / "python" / client.script)]
    ended = subprocess.run(
        command,
        env=inherited_environment() | environment | {"OPENAI_API_KEY": environment["POLYPEFT_KEY"]},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return reported(ended.stdout) or {"its script": ended.stderr[-300:]}


def reported(text: str) -> Results:
    """The results in what a script wrote, each on a line."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"feature"')]
    return {line["feature"]: line["fault"] for line in lines}


def in_a_browser(environment: dict[str, str]) -> dict[str, Results]:
    """What a page reports that is served from another port; nothing without a Chromium."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.stdout.write("No Chromium is installed: no page was tried.\n")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        names = ("url", "key", "model", "adapter")
        settings = {name: environment[f"POLYPEFT_{name.upper()}"] for name in names}
        page = (HERE / "page" / "page.html").read_text().replace("@SETTINGS@", json.dumps(settings))
        (Path(folder) / "page.html").write_text(page)
        pages = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
        Thread(target=pages.serve_forever, daemon=True).start()
        try:
            address = f"http://localhost:{pages.server_port}/page.html"
            shell = [browser, "--headless", "--no-sandbox", "--dump-dom", PATIENCE, address]
            shown = subprocess.run(shell, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
        finally:
            pages.shutdown()
    version = subprocess.run([browser, "--version"], capture_output=True, text=True, check=False).stdout
    lines = shown.replace('<pre id="lines">', "\n").replace("&gt;", ">")
    return {f"{PAGE}, {version.strip().split()[-1]}": reported(lines)}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
