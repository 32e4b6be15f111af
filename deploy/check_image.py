"""Runs inside the image for deploy/check-image: its entry point, its health check, an answer, its end."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

URL = "http://127.0.0.1:8000"
SECONDS = 180


def call(path: str, key: str, body: object) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def healthy(command: list[str]) -> bool:
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


def ready() -> bool:
    try:
        return bool(urllib.request.urlopen(URL + "/readyz", timeout=4).status == 200)
    except OSError:
        return False


def main() -> None:
    image = json.loads(Path("/data/image.json").read_text())
    assert not healthy(image["health"]), "the health check passes where nothing runs"
    server = subprocess.Popen(image["start"], env=os.environ | {"POLYPEFT_MODEL": "/data/tiny"})
    try:
        end = time.monotonic() + SECONDS
        while not (ready() and healthy(image["health"])):
            assert server.poll() is None, f"it ended with status {server.poll()}"
            assert time.monotonic() < end, f"not ready after {SECONDS} s"
            time.sleep(0.5)
        operator = Path("/data/admin.key").read_text().strip()
        key = call("/admin/tenants", operator, {"name": "acme"})["key"]
        asked = {"model": "tiny", "prompt": "One frozen base", "max_tokens": 8, "ignore_eos": True}
        answer = call("/v1/completions", key, asked)
        assert answer["usage"]["completion_tokens"] == 8, answer
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, server.returncode
    finally:
        server.kill()
    sys.stdout.write("ready, healthy, answered 8 tokens, ended with status 0\n")


if __name__ == "__main__":
    main()
