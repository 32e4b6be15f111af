"""Run a numba kernel on torch's own OpenMP threads.

numba's thread pools would fight with torch's for the same cores: an idle OpenMP worker spins for a while
after each region. So a kernel is compiled as a C function `void(int64*)` and handed to GOMP_parallel of
the very libgomp that torch is linked against. A launch costs about 3 µs and releases the GIL.
"""

import ctypes
from collections.abc import Callable, Hashable
from typing import Any

import torch

try:
    import llvmlite.binding as llvm
    import numba as nb
    from numba import types
    from numba.extending import intrinsic

    _torch = ctypes.CDLL(torch._C.__file__)  # noqa: SLF001 - symbols of its dependencies resolve through it
    _parallel = _torch.GOMP_parallel
    _parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    _parallel.restype = None
    for _name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
        llvm.add_symbol(_name, ctypes.cast(getattr(_torch, _name), ctypes.c_void_p).value)
    AVAILABLE = True
except (ImportError, OSError, AttributeError):  # not Linux, no numba, or a torch without libgomp
    AVAILABLE = False

if AVAILABLE:
    thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
    num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
    barrier = types.ExternalFunction("GOMP_barrier", types.void())

    def _pointer_to(element: Any) -> Any:
        def typed(_context: Any, address: Any) -> Any:  # noqa: ARG001 - numba matches arguments by name
            signature = types.CPointer(element)(types.int64)

            def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

            return signature, generate

        return intrinsic(typed)

    _f32 = _pointer_to(types.float32)
    _i64 = _pointer_to(types.int64)

    @nb.njit(inline="always", cache=True)  # type: ignore[untyped-decorator]
    def floats(address: int, count: int) -> Any:
        """float32[count] at an address."""
        return nb.carray(_f32(address), count)

    @nb.njit(inline="always", cache=True)  # type: ignore[untyped-decorator]
    def ints(address: int, count: int) -> Any:
        """int64[count] at an address."""
        return nb.carray(_i64(address), count)

    _i32 = _pointer_to(types.int32)

    @nb.njit(inline="always", cache=True)  # type: ignore[untyped-decorator]
    def words(address: int, count: int) -> Any:
        """int32[count] at an address."""
        return nb.carray(_i32(address), count)

    _i16 = _pointer_to(types.int16)

    @nb.njit(inline="always", cache=True)  # type: ignore[untyped-decorator]
    def shorts(address: int, count: int) -> Any:
        """int16[count] at an address."""
        return nb.carray(_i16(address), count)

    def _bits_as(result: Any, source: Any) -> Any:
        def typed(_context: Any, value: Any) -> Any:  # noqa: ARG001 - as above
            def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                return builder.bitcast(args[0], context.get_value_type(sig.return_type))

            return result(source), generate

        return intrinsic(typed)

    bits_to_float = _bits_as(types.float32, types.int32)
    float_to_bits = _bits_as(types.int32, types.float32)


class ShapeError(RuntimeError):
    """A kernel was asked to address memory beyond its tensors."""


def require(fits: bool, what: str) -> None:
    """Before addresses go to a kernel, which checks nothing. Raises ShapeError."""
    if not fits:
        raise ShapeError(what)


def use_one_thread() -> None:
    """Torch's operators called from this thread stay on it; other threads keep their teams.

    More than manners: once a process has more OpenMP threads than the machine has cores, libgomp's stop
    spinning between regions, and every launch of the engine's pays for waking its team (a step took 1.6
    times as long).
    """
    torch.get_num_threads()  # torch sets a thread's count on its first use of it; let that be behind us
    if AVAILABLE:
        _torch.omp_set_num_threads(1)


Launcher = Callable[..., None]  # (arguments, *, parallel=True)
Arguments = Any  # a ctypes array of int64: pointers and sizes


def arguments(*values: int) -> Arguments:
    return (ctypes.c_int64 * len(values))(*values)


def bits_of(value: float) -> int:
    """Of a float32, for a kernel's arguments."""
    return ctypes.c_int32.from_buffer_copy(ctypes.c_float(value)).value


class Arena:
    """What launches read and write, for recordings of which one runs at a time: they may share it.

    Tensors are [tokens, ...]. A recording of more tokens than any before it takes larger ones; those before
    it keep theirs.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, torch.Tensor] = {}

    def take(self, place: Hashable, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Of anything, and of the type of `like`: the memory of this place."""
        held = self._held.get(place)
        if held is None or len(held) < shape[0] or held.shape[1:] != shape[1:]:
            tokens = max(64, 1 << (shape[0] - 1).bit_length())
            held = self._held[place] = like.new_empty(tokens, *shape[1:])
        return held[: shape[0]]


class Recorder:
    """While it is entered, launches are noted and not made; what they write comes from `empty`."""

    def __init__(self, arena: Arena) -> None:
        self.launches: list[tuple[int, Arguments]] = []
        self._arena = arena
        self._kept: list[torch.Tensor] = []  # what others make the arena give up
        self._turn, self._taken = 0, 0

    def __enter__(self) -> "Recorder":
        global _recorder
        assert _recorder is None, "one recording at a time"
        _recorder = self
        return self

    def __exit__(self, *_exception: object) -> None:
        global _recorder
        _recorder = None

    def next_layer(self) -> None:
        """What was taken before the last turn may be written over: nobody reads it any more."""
        self._turn, self._taken = 1 - self._turn, 0

    def take(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        self._kept.append(self._arena.take((self._turn, self._taken), like, shape))
        self._taken += 1
        return self._kept[-1]


_recorder: Recorder | None = None


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """For a kernel to write to: of the type and device of `like`."""
    return like.new_empty(shape) if _recorder is None else _recorder.take(like, shape)


def kernel(body: Callable[[Any], None]) -> Launcher:
    """Compile `body(args: int64*)` and return a launcher; every OpenMP thread runs the body once.

    The body asks thread_num() and num_threads() for its share. All it needs must be alive until the
    launch returns; the launch is synchronous. The machine code is kept beside the source.

    What it calls is compiled with `fastmath`, too, unless it says otherwise: numba hands that down, but not
    to machine code that it finds kept. So what must give the same bits each time says `fastmath=False`.
    """
    signature = types.void(types.CPointer(types.int64))
    address = nb.cfunc(signature, cache=True, fastmath=True, error_model="numpy")(body).address

    def launch(args: Arguments, *, parallel: bool = True) -> None:
        """`parallel=False`: on this thread alone, for work that is smaller than a barrier."""
        if _recorder is not None:
            _recorder.launches.append((address, args))
        else:
            _parallel(address, ctypes.addressof(args), torch.get_num_threads() if parallel else 1, 0)

    return launch
