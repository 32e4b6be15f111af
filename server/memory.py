"""What this process takes of the machine's memory."""

import resource
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def resident_bytes() -> int:
    """Resident now; where the system does not say, the most it ever was."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
