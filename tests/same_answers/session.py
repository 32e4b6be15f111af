"""One server under questions: what was asked and answered is written down, page by page."""

import json
import re
from pathlib import Path
from typing import Any

import httpx

from tests.same_answers.serving import client
from tests.same_answers.volatile import Placeholders, readable

BASE = "smollm2-135m-instruct"
PROMPT = "The capital of France is"
UNWRITTEN = {"content-length", "date", "server"}  # headers that follow from the rest, or from the clock
SAMPLE = re.compile(r"^([\w:]+(?:\{.*\})?) \S+$")


class Session:
    """Asks as the operator, as the tenants that `tenant` made, with a wrong key, or with none."""

    def __init__(self, url: str, operator: str, placeholders: Placeholders) -> None:
        self.url = url
        self.keys: dict[str, str | None] = {"operator": operator, "nobody": None, "stranger": "pp-wrong"}
        self.ids: dict[str, str] = {}  # by what a later question calls them
        self.page = ""
        self._pages: dict[str, list[str]] = {}
        self._placeholders = placeholders

    def tenant(self, name: str) -> None:
        made = self.ask("operator", "POST", "/admin/tenants", json={"name": name}).json()
        self.keys[name], self.ids[name] = made["key"], made["id"]

    def ask(self, who: str, method: str, path: str, **request: Any) -> httpx.Response:
        with client(self.url, self.keys[who]) as http:
            answer = http.request(method, path, **request)
        self._note(f"{who}: {method} {path[:400]}{_told(request)}", answer)
        return answer

    def complete(self, who: str = "acme", **fields: Any) -> httpx.Response:
        """A greedy completion of the base, of few tokens, unless `fields` say otherwise."""
        asked = {"model": BASE, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        return self.ask(who, "POST", "/v1/completions", json=asked | fields)

    def chat(self, who: str = "acme", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "Name a colour."}]
        asked = {"model": BASE, "messages": messages, "max_tokens": 8, "temperature": 0}
        return self.ask(who, "POST", "/v1/chat/completions", json=asked | fields)

    def metrics(self) -> None:
        """Every family's name, help and type, and every series; no value."""
        with client(self.url, self.keys["operator"]) as http:
            lines = http.get("/metrics").text.splitlines()
        self.write("\n".join(sorted(SAMPLE.sub(r"\1", line) for line in lines)))

    def write(self, text: str) -> None:
        self._pages.setdefault(self.page, []).append(self._placeholders.replace(text))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, entries in self._pages.items():
            (folder / f"{name}.txt").write_text("\n\n".join(entries) + "\n")

    def _note(self, title: str, answer: httpx.Response) -> None:
        headers = [f"{k}: {v}" for k, v in sorted(answer.headers.items()) if k not in UNWRITTEN]
        kind = answer.headers.get("content-type", "")
        told = answer.content.hex()[:64] if "octet-stream" in kind else answer.text
        head = "\n".join([f"## {title}", str(answer.status_code), *headers])
        self.write(f"{head}\n\n{readable(told)}")


def _told(request: dict[str, Any]) -> str:
    """What tells a request from others; of files and bytes not all."""
    shown = {k: v for k, v in request.items() if k not in ("files", "content")}
    if content := request.get("content"):
        shown["content"] = repr(content[:40])
    if files := request.get("files"):
        shown["files"] = [name for _, (name, _) in files] if isinstance(files, list) else repr(files)
    text = json.dumps(shown) if shown else ""
    return f" {text if len(text) < 400 else text[:400] + '...'}" if text else ""
