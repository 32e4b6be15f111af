"""The Dockerfile: linted, and what it says of itself. deploy/check-image builds and runs it, by hand."""

import re
import subprocess
import sys
from pathlib import Path

from tests.deploy.prometheus import DEPLOY, ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_sees_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace("WORKDIR /src", "RUN cd /src"))
    done = subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode != 0


def test_scripts_are_programs_of_bash() -> None:
    for name in ("up", "check-image"):
        path = DEPLOY / name
        assert path.stat().st_mode & 0o111, name
        assert path.read_text().startswith("#!/usr/bin/env bash\n")
        subprocess.run(["bash", "-n", path], check=True)


def test_the_context_is_what_the_build_copies() -> None:
    """Nothing else of a checkout goes to the builder: no data, no secrets, no .git."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    copied = {word for line in lines for word in line.split()[:-1]}
    assert copied == allowed


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    base = re.search(r"^ARG BASE=(.+)$", DOCKERFILE, re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", base[1])
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)
    assert "HEALTHCHECK" in DOCKERFILE
