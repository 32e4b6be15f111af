"""A step that takes long is waited for; one that hangs ends its process, which says why."""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.engine.client import EngineClient
from server.engine.watchdog import EXIT_STATUS, FLOOR_SECONDS, MULTIPLE, StepClock
from server.errors import EngineLost
from server.messages import Generate, Sampling
from server.settings import Settings, child_environment

pytestmark = pytest.mark.anyio

HANGS, IS_SLOW = 13, 14  # first tokens of prompts
# the real engine with a short floor, in which the forward pass of such prompts stands still
ENGINE = f"""
import time
from server.engine import __main__ as main, served_model, watchdog
watchdog.BEAT_SECONDS, watchdog.FLOOR_SECONDS, watchdog.MULTIPLE = 0.1, 3.0, 1.5
forward = served_model.ServedModel.forward
def slow(self, rows):
    first = {{row.tokens[0] for row in rows}}
    if {HANGS} in first:
        time.sleep(600)
    if {IS_SLOW} in first:
        time.sleep(1)
    return forward(self, rows)
served_model.ServedModel.forward = slow
main.run_child("engine", main.serve)
"""


def row(first: int, id_: str = "r") -> Generate:
    return Generate(id_, "ten_a", [first, 2, 3], Sampling(max_tokens=2, temperature=0.0, ignore_eos=True))


class Engine:
    def __init__(self, settings: Settings) -> None:
        self.address = settings.engine_socket
        self._settings = settings

    def start(self) -> "subprocess.Popen[bytes]":
        program = [sys.executable, "-c", ENGINE]
        environment = child_environment(self._settings)
        self.process = subprocess.Popen(program, env=environment, stderr=subprocess.PIPE)
        return self.process


@pytest.fixture
def engine(tiny_models: Callable[[str], Path]) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="pp") as folder:
        settings = Settings(
            model=str(tiny_models("llama")), data_dir=Path(folder), threads=1, kv_bytes=8 << 20
        )
        settings.run_dir.mkdir()
        it = Engine(settings)
        yield it
        it.process.kill()
        it.process.wait()


async def answer(client: EngineClient, command: Generate) -> list[int]:
    return [token async for chunk in client.generate(command) for token in chunk.tokens]


async def test_a_step_that_hangs_ends_the_engine_and_its_rows_hear_why(engine: Engine) -> None:
    process = engine.start()
    client = EngineClient(engine.address)
    await client.start()
    await client.wait_for_stats(90)
    assert len(await answer(client, row(IS_SLOW))) == 2  # slow, and no more than that
    with pytest.raises(EngineLost, match=r"A step of the engine has run for 3 s and its bound is 3 s"):
        await answer(client, row(HANGS))
    _, said = await asyncio.to_thread(process.communicate)
    assert process.returncode == EXIT_STATUS
    assert said.count(b"the engine hangs and ends") == 1
    assert b"time.sleep" in said or b"in slow" in said, "where it hangs"
    assert not client.ready
    await client.close()


def test_nothing_measured_bounds_a_step_by_the_floor() -> None:
    clock = StepClock()
    clock.begin(512)
    assert clock.bound == FLOOR_SECONDS


def test_a_bound_follows_what_such_steps_take() -> None:
    clock = StepClock()
    for _ in range(100):
        clock.end(1, 2.0)
        clock.end(256, 60.0)
    for tokens, seconds in ((1, 2.0), (256, 60.0), (300, 60.0), (512, 120.0), (2, 4.0)):
        clock.begin(tokens)
        assert clock.bound == pytest.approx(max(FLOOR_SECONDS, MULTIPLE * seconds))
    clock.next_iteration()
    assert clock.bound == FLOOR_SECONDS


def test_one_slow_step_among_quick_ones_is_forgotten() -> None:
    """The first of its size compiles kernels."""
    clock = StepClock()
    clock.end(64, 100.0)
    clock.begin(64)
    assert clock.bound == MULTIPLE * 100.0
    for _ in range(200):
        clock.end(64, 0.1)
    clock.begin(64)
    assert clock.bound == FLOOR_SECONDS
