"""How much memory this process holds, as the operating system counts it."""

import resource
import sys
from pathlib import Path


def resident() -> int:
    """Return the bytes held now; where that cannot be read, the most held so far."""
    return _status("VmRSS") or _most()


def peak_resident() -> int:
    """Return the most bytes held at once so far."""
    # not ru_maxrss: it covers the process that started this one too (487 MB read in a child of 9)
    return _status("VmHWM") or _most()


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _most() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
