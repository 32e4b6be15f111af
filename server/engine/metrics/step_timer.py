"""Time of a step by phase. On a CPU every step is timed, and calls of adapter banks in one of SAMPLE_EVERY.

CUDA kernels run asynchronously, so a timed step waits for the device after each phase. On CUDA only one step
of SAMPLE_EVERY_CUDA is timed, and no lookahead step runs beside it.
"""

import time
from collections.abc import Callable
from typing import Any, cast

import torch

from server.adapters.methods.interface import Bank
from server.engine.metrics.counters import EngineMetrics
from server.engine.model.forward_context import ForwardContext

SAMPLE_EVERY, SAMPLE_EVERY_CUDA = 16, 64


class StepTimer:
    """Observes `step_seconds` by phase."""

    def __init__(self, metrics: EngineMetrics, device: torch.device) -> None:
        self._metrics = metrics
        self._cuda = device.type == "cuda"
        self._every = SAMPLE_EVERY_CUDA if self._cuda else SAMPLE_EVERY
        self._steps = 0
        self._phase_start = 0.0
        self._bank_seconds = 0.0

    def begin(self, start: float) -> None:
        """A step that began at `start`, by time.perf_counter(), has been scheduled."""
        self._steps += 1
        self._phase_start, self._bank_seconds = start, 0.0
        self.lap("schedule")

    def lap(self, phase: str) -> None:
        """Observe the time since the end of the previous phase."""
        if not self._cuda:
            now = time.perf_counter()
        elif self._sampled:
            torch.cuda.synchronize()
            now = time.perf_counter()
        else:
            return
        self._metrics.observe("step_seconds", now - self._phase_start, phase)
        self._phase_start = now
        if phase == "forward" and self._bank_seconds:
            self._metrics.observe("step_seconds", self._bank_seconds, "adapter")

    def time_banks(self, step: ForwardContext) -> None:
        """In a sampled step, replace the acting banks by ones that time their calls."""
        step.time_banks(
            (lambda bank: cast("Bank", TimedBank(bank, self.time_call))) if self._sampled else None
        )

    @property
    def samples_soon(self) -> bool:
        """This step or the next one is sampled, so no lookahead may run beside it."""
        return self._sampled or (self._steps + 1) % self._every == 0

    @property
    def _sampled(self) -> bool:
        return self._steps % self._every == 0

    def time_call(self, call: Callable[[], Any]) -> Any:
        """Run `call` and add its seconds to those of the banks."""
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        if self._cuda:
            torch.cuda.synchronize()
        self._bank_seconds += time.perf_counter() - start
        return result


class TimedBank:
    """A bank that times each of its calls."""

    def __init__(self, bank: Bank, time_call: Callable[[Callable[[], Any]], Any]) -> None:
        self._bank = bank
        self._time_call = time_call

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._bank, name)
        return lambda *args: self._time_call(lambda: method(*args))
