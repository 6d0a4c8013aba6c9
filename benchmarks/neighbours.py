"""How much of the machine others take while something is measured; Linux counts it."""

import os
from collections.abc import Iterable
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)  # a second of the whole machine


class Neighbours:
    """Watch the processor time that is not one's own."""

    def __init__(self, own: Iterable[int]) -> None:
        """Take these processes, and this one, for one's own."""
        self._own = [os.getpid(), *own]
        self._begin = self._read()

    def share(self) -> float:
        """Return the share of the machine that others took since the start."""
        taken, seconds = (now - then for now, then in zip(self._read(), self._begin, strict=True))
        return max(0.0, taken / (seconds * TICKS))

    def _read(self) -> tuple[float, float]:
        user, nice, system, _, _, interrupt, soft, steal = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        mine = sum(_ticks(pid) for pid in self._own)
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
        return user + nice + system + interrupt + soft + steal - mine, since_boot


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # in its own code, in the kernel's for it
