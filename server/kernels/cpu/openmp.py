"""Run numba kernels on torch's own OpenMP threads, and record their launches.

numba's thread pools would compete with torch's for the same cores: an idle OpenMP worker spins for a while
after each region. So a kernel is compiled as a C function `void(int64*)` and passed to GOMP_parallel of the
libgomp that torch is linked against. A launch costs about 3 µs and releases the GIL.
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
    """Check sizes before addresses go to a kernel, which checks nothing. Raises ShapeError if not `fits`."""
    if not fits:
        raise ShapeError(what)


def use_one_thread() -> None:
    """Run torch's operators called from this thread on it alone; other threads keep their teams.

    Once a process has more OpenMP threads than the machine has cores, libgomp's threads stop spinning between
    regions, and every launch of the engine pays for waking its team (a step took 1.6 times as long).
    """
    torch.get_num_threads()  # torch sets a thread's count on first use, which would undo the next line
    if AVAILABLE:
        _torch.omp_set_num_threads(1)


Launcher = Callable[..., None]  # (arguments, *, parallel=True)
Arguments = Any  # a ctypes array of int64: pointers and sizes


def arguments(*values: int) -> Arguments:
    """The arguments of a launch."""
    return (ctypes.c_int64 * len(values))(*values)


def bits_of(value: float) -> int:
    """The bits of a float32 as an integer, for a kernel's arguments."""
    return ctypes.c_int32.from_buffer_copy(ctypes.c_float(value)).value


class Arena:
    """Scratch tensors [tokens, ...] shared by all recordings, since only one runs at a time.

    A recording of more tokens than any before it allocates larger ones; earlier recordings keep theirs.
    """

    def __init__(self) -> None:
        self._tensors: dict[Hashable, torch.Tensor] = {}

    def take(self, key: Hashable, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor under `key`, of this shape and the type of `like`; its content is undefined."""
        tensor = self._tensors.get(key)
        if tensor is None or len(tensor) < shape[0] or tensor.shape[1:] != shape[1:]:
            tokens = max(64, 1 << (shape[0] - 1).bit_length())
            tensor = self._tensors[key] = like.new_empty(tokens, *shape[1:])
        return tensor[: shape[0]]


class Recorder:
    """While entered, launches are recorded instead of made, and `empty` allocates in the arena."""

    def __init__(self, arena: Arena) -> None:
        self.launches: list[tuple[int, Arguments]] = []  # (address of the kernel, its arguments)
        self._arena = arena
        self._kept: list[torch.Tensor] = []  # alive even if a later recording replaces them in the arena
        self._parity, self._taken = 0, 0

    def __enter__(self) -> "Recorder":
        global _recorder
        assert _recorder is None, "one recording at a time"
        _recorder = self
        return self

    def __exit__(self, *_exception: object) -> None:
        global _recorder
        _recorder = None

    def next_layer(self) -> None:
        """Reuse the tensors taken before the last call: a layer reads only its own and the one before's."""
        self._parity, self._taken = 1 - self._parity, 0

    def take(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of this shape and the type of `like`, unused by this layer and the one before."""
        self._kept.append(self._arena.take((self._parity, self._taken), like, shape))
        self._taken += 1
        return self._kept[-1]


_recorder: Recorder | None = None


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor for a kernel to write to, of the type and device of `like`."""
    return like.new_empty(shape) if _recorder is None else _recorder.take(like, shape)


def kernel(body: Callable[[Any], None]) -> Launcher:
    """Compile `body(args: int64*)` and return a launcher; every OpenMP thread runs the body once.

    The body finds its share by thread_num() and num_threads(). All tensors it uses must be alive until the
    launch returns; the launch is synchronous. The machine code is cached beside the source.

    numba compiles callees with `fastmath` too, unless they set it themselves; but not callees that it finds
    in its cache. So functions that must give the same bits each time set `fastmath=False`.
    """
    signature = types.void(types.CPointer(types.int64))
    address = nb.cfunc(signature, cache=True, fastmath=True, error_model="numpy")(body).address

    def launch(args: Arguments, *, parallel: bool = True) -> None:
        """`parallel=False`: run on this thread alone, for work that takes less time than a barrier."""
        if _recorder is not None:
            _recorder.launches.append((address, args))
        else:
            _parallel(address, ctypes.addressof(args), torch.get_num_threads() if parallel else 1, 0)

    return launch
