"""The command line in this process, beside a real server with a fake engine."""

import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from server.cli.main import main
from server.engine.fake import Behaviour
from server.settings import Settings
from tests.fixtures.services import empty
from tests.server.api.conftest import System, running
from tests.server.api.generation.tokenizers import byte_level_tokenizer


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def system(valkey_url: str) -> Iterator[System]:
    empty(valkey_url)
    folder = Path(tempfile.mkdtemp(prefix="pp"))
    byte_level_tokenizer(folder / "model")
    settings = Settings(model=str(folder / "model"), data_dir=folder, redis_url=valkey_url)
    settings.run_dir.mkdir()
    with running(settings) as system:
        yield system
    shutil.rmtree(folder)


@pytest.fixture
def run(system: System, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`polypeft ARGUMENTS` in this process, as the operator unless a key is given."""
    monkeypatch.setenv("POLYPEFT_URL", system.url)
    monkeypatch.setenv("POLYPEFT_DATA_DIR", str(system.settings.data_dir))
    monkeypatch.delenv("POLYPEFT_API_KEY", raising=False)
    system.engine.behaviour = Behaviour()

    def call(*arguments: str, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["polypeft", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Done(int(end.value.code or 0), said.out, said.err)

    return call
