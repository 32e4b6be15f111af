"""The server keeps what its OpenAPI document says, whatever is sent: schemathesis, in three of its phases."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.conftest import System, started

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
EXAMPLES = 1  # of each operation in the phase that draws them


@pytest.fixture(scope="module")
def documented(valkey_url: str) -> Iterator[System]:
    with started(valkey_url) as it:
        yield it


def test_no_answer_is_undocumented(documented: System, tmp_path: Path) -> None:
    command = [
        *(str(SCHEMATHESIS), "run", f"{documented.url}/openapi.json"),
        *("-H", f"Authorization: Bearer {documented.operator}", "-c", ",".join(CHECKS)),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", "1"),
        *("--generation-database", "none", "--suppress-health-check", "all", "--no-color"),
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
