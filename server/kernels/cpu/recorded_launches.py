"""Many launches as one: the launches of a Recorder, run in one parallel region with a barrier after each.

A single launch costs the engine's thread some ten microseconds of Python, and wakes the team. Here threads
only wait at barriers, a fraction of a microsecond each.
"""

import ctypes

from server.kernels.cpu.openmp import AVAILABLE, Recorder, arguments

if AVAILABLE:
    from typing import Any

    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    from server.kernels.cpu.openmp import barrier, ints, kernel

    @intrinsic  # type: ignore[untyped-decorator]
    def _call(_context: Any, address: Any, args: Any) -> Any:  # noqa: ARG001 - numba matches arguments by name
        """Call a kernel's body: void(int64*)."""

        def generate(context: Any, b: Any, _sig: Any, values: Any) -> Any:
            pointer = ir.IntType(64).as_pointer()
            body = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
            b.call(b.inttoptr(values[0], body), [b.inttoptr(values[1], pointer)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    @kernel
    def _run(args):  # type: ignore[no-untyped-def]
        launches = ints(args[1], 2 * args[0])
        for i in range(args[0]):
            _call(launches[2 * i], launches[2 * i + 1])
            barrier()


class RecordedLaunches:
    """Launches in their order, and the memory they own. Everything else they point to must stay in place."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder  # keeps arguments and buffers
        self.launches = len(recorder.launches)
        flat = [value for address, args in recorder.launches for value in (address, ctypes.addressof(args))]
        self._flat = arguments(*flat)
        self._args = arguments(self.launches, ctypes.addressof(self._flat))

    def __call__(self) -> None:
        _run(self._args)
