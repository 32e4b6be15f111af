"""The sandboxed program: reads a torch pickle from stdin, writes safetensors to stdout, or exits with status
1.

pickle_sandbox.py runs it with `python -I`; it imports nothing of ours. It gives up its rights before it reads
the first byte. torch's weights_only unpickler builds nothing but tensors, and unusual ones (sparse,
quantised, larger than the file) are refused.
"""

import contextlib
import ctypes
import io
import os
import resource
import sys
from pathlib import Path
from typing import BinaryIO

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38
ROOM_BYTES = 1 << 30  # beyond what torch itself takes, and beside a few times the file


def main() -> None:
    leave_network()
    import torch

    torch.set_num_threads(1)
    rehearsal = io.BytesIO()
    torch.save({"": torch.zeros(1)}, rehearsal)
    convert(rehearsal, len(rehearsal.getvalue()))  # all late imports happen here, before the limits
    size = os.fstat(sys.stdin.fileno()).st_size
    limit(size, cpu_seconds=int(sys.argv[1]))
    sys.stdout.buffer.write(convert(sys.stdin.buffer, size))
    sys.stdout.buffer.flush()


def convert(file: BinaryIO, size: int) -> bytes:
    import torch
    from safetensors.torch import save

    file.seek(0)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError("not a dictionary of tensors")
    if not all(isinstance(name, str) and plain(tensor) for name, tensor in tensors.items()):
        raise ValueError("not all plain tensors")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * size:
        raise ValueError("larger than its file")
    # clones: a pickle may have two names for one storage, safetensors may not
    return save({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()})


def plain(tensor: object) -> bool:
    import torch

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    kinds = (torch.Tensor, torch.nn.Parameter)
    return isinstance(tensor, kinds) and tensor.layout == torch.strided and tensor.dtype in dtypes


def leave_network() -> None:
    """Enter an empty network namespace, where an unprivileged process may; forbid new privileges."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(AttributeError):  # not Linux
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.unshare(CLONE_NEWNET):
            libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)


def limit(size: int, cpu_seconds: int) -> None:
    """Limit memory to a few copies of the file, and processor time; forbid new files and processes."""
    if sys.platform == "linux":  # elsewhere the size is not known, or the limit not enforced
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + ROOM_BYTES + 8 * size
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + (8 << 20), 2 * size + (8 << 20)))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
        resource.setrlimit(kind, (0, 0))


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    finally:
        os._exit(status)  # no destructor of what was read runs, and nothing is printed
