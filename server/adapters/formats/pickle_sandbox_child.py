"""The inside of the sandbox: a torch pickle on stdin becomes safetensors on stdout, or exit status 1.

A program, run by `pickle_sandbox.py` with `python -I`; imports nothing of ours. It takes from itself what it
will not need before it looks at the first byte. Only plain tensors are let through: torch's weights_only
unpickler builds nothing else, and what is odd about a tensor (sparse, quantised, larger than the file) is
refused.
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
    convert(rehearsal, len(rehearsal.getvalue()))  # all that is imported late is imported now
    size = os.fstat(sys.stdin.fileno()).st_size
    limit(size, cpu_seconds=int(sys.argv[1]))
    sys.stdout.buffer.write(convert(sys.stdin.buffer, size))
    sys.stdout.buffer.flush()


def convert(file: BinaryIO, size: int) -> bytes:
    import torch
    from safetensors.torch import save

    file.seek(0)
    found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not found:
        raise ValueError("not a dictionary of tensors")
    if not all(isinstance(name, str) and plain(tensor) for name, tensor in found.items()):
        raise ValueError("not all plain tensors")
    if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > 2 * size:
        raise ValueError("larger than its file")
    # clones: two names for one storage are legal in a pickle and not in safetensors
    return save({name: tensor.detach().contiguous().clone() for name, tensor in found.items()})


def plain(tensor: object) -> bool:
    import torch

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    kinds = (torch.Tensor, torch.nn.Parameter)
    return isinstance(tensor, kinds) and tensor.layout == torch.strided and tensor.dtype in dtypes


def leave_network() -> None:
    """An empty network of its own, where the system lets an ordinary process have one; and no new rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(AttributeError):  # not Linux
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.unshare(CLONE_NEWNET):
            libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)


def limit(size: int, cpu_seconds: int) -> None:
    """Memory for a few copies of the file, some seconds, no file to open, and no process to start."""
    if sys.platform == "linux":  # elsewhere nobody says, or heeds, how much it is
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + ROOM_BYTES + 8 * size
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + (8 << 20), 2 * size + (8 << 20)))
    for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC):
        resource.setrlimit(nothing, (0, 0))


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    finally:
        os._exit(status)  # nothing of what was read gets to run a destructor, or to say a word
