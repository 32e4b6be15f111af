"""`polypeft tune` as its users run it: the guide's walk on a GPT-2, and the whole server killed midway."""

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.e2e.chaos.test_finetune_kills import Impatient
from tests.e2e.conftest import OPTIONS
from tests.e2e.serving import POLYPEFT
from tests.waiting import until

GUIDE = ["--r", "16", "--lora-alpha", "32", "--lora-dropout", "0.1", "--target-modules", "c_attn"]
TRAIN_SECONDS = 180.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.timeout(600)
def test_the_guides_walk_on_gpt2_outlives_the_server(tiny_models: Any, tmp_path: Path) -> None:
    """One file of short texts: LoRA on c_attn, batches of 2; the command is never started again."""
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"Number {i} is a number."}) + "\n" for i in range(60)))
    server = Impatient(str(tiny_models("gpt2")), tmp_path / "server", *OPTIONS, "--port", str(free_port()))
    try:
        server.start()
        key = server.tenant("guide")
        environment = os.environ | {"POLYPEFT_URL": server.url, "POLYPEFT_API_KEY": key}
        options = ["--name", "walk", "--epochs", "4", "--batch-size", "2", "--learning-rate", "0.01"]
        options += ["--early-stopping", "0"]
        command = [*POLYPEFT, "tune", str(data), "--method", "lora", *GUIDE, *options]
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            tune = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        said = tmp_path / "err"
        until(lambda: "Step 1/" in said.read_text(), server.log, TRAIN_SECONDS)
        children = server.pids()
        server.end()
        until(lambda: "does not answer" in said.read_text(), said.read_text)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
        server.start()
        assert tune.wait(TRAIN_SECONDS) == 0, said.read_text()
        assert said.read_text().count("Created fine-tuning job") == 1
        # not told twice; nor once, if the server died between the last checkpoint and the word of its step
        assert said.read_text().count("Step 108/108") <= 1
        assert "The job has successfully completed" in said.read_text()
        table = [line.split("\t") for line in (tmp_path / "out").read_text().splitlines()]
        assert float(table[0][2]) < float(table[0][1]), table
        asked = subprocess.run(
            [*POLYPEFT, "complete", "Number 7", "--adapter", "walk", "--max-tokens", "4"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert asked.returncode == 0, asked.stderr
        with server.http(key) as http:
            version = http.get("/v1/adapters/walk/versions/1").json()
            weights = http.get("/v1/adapters/walk/versions/1/download").content
        (tmp_path / "adapter.safetensors").write_bytes(weights)
        assert {name.split(".")[-3] for name in load_file(tmp_path / "adapter.safetensors")} == {"c_attn"}
        config = version["config"]
        assert (config["r"], config["lora_alpha"]) == (16, 32)
        server.stop()
    finally:
        server.end()
