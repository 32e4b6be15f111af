"""Where a step's time goes, by phase. On a CPU every step; what adapters take, in one step of EVERY.

On CUDA launching is not computing, so the clock waits for the device, and does so in one step of EVERY_CUDA
only, which runs beside no other.
"""

import time
from collections.abc import Callable
from typing import Any, cast

import torch

from server.adapters.methods.interface import Bank
from server.engine.metrics.counters import EngineMetrics
from server.engine.model.forward_context import ForwardContext

EVERY, EVERY_CUDA = 16, 64


class StepTimer:
    def __init__(self, figures: EngineMetrics, device: torch.device) -> None:
        self._figures = figures
        self._cuda = device.type == "cuda"
        self._every = EVERY_CUDA if self._cuda else EVERY
        self._steps = 0
        self._at = 0.0
        self._in_banks = 0.0

    def begin(self, at: float) -> None:
        """A step began at `at`, time.perf_counter(), and has been scheduled."""
        self._steps += 1
        self._at, self._in_banks = at, 0.0
        self.lap("schedule")

    def lap(self, phase: str) -> None:
        """This phase has ended."""
        if not self._cuda:
            now = time.perf_counter()
        elif self._sampled:
            torch.cuda.synchronize()
            now = time.perf_counter()
        else:
            return
        self._figures.observe("step_seconds", now - self._at, phase)
        self._at = now
        if phase == "forward" and self._in_banks:
            self._figures.observe("step_seconds", self._in_banks, "adapter")

    def watch(self, step: ForwardContext) -> None:
        """Time the banks of the step under way, if it is its turn."""
        step.time_banks((lambda bank: cast("Bank", Timed(bank, self.spent))) if self._sampled else None)

    @property
    def looks(self) -> bool:
        """At this step or the next: then nothing may run beside them."""
        return self._sampled or (self._steps + 1) % self._every == 0

    @property
    def _sampled(self) -> bool:
        return self._steps % self._every == 0

    def spent(self, call: Callable[[], Any]) -> Any:
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if self._cuda:
            torch.cuda.synchronize()
        self._in_banks += time.perf_counter() - start
        return result


class Timed:
    """A bank, each of whose calls is timed."""

    def __init__(self, bank: Bank, spent: Callable[[Callable[[], Any]], Any]) -> None:
        self._bank = bank
        self._spent = spent

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._bank, name)
        return lambda *args: self._spent(lambda: method(*args))
