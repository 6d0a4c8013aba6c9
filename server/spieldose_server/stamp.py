"""What tells one state of a file from another."""

import os
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Stamp:
    """Tell one state of a file from another."""

    inode: int
    size: int
    modified: int  # nanoseconds
    changed: int  # the same, which no program can set back

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Take the stamp of a file's status."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
