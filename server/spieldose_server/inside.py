"""Open what lies in a directory, and nothing else, wherever links lead and whatever they turn into.

The directory itself may be a link. Which file was opened is asked of the open file, not of a path
that may have changed since. A hard link is a file of the directory: nothing tells it apart.
"""

import os
import stat
import sys
from io import BufferedReader
from pathlib import Path

from spieldose_kernels.errors import NotADelta

# a FIFO does not block who opens it, a terminal does not become the server's own
FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_inside(directory: Path, name: str) -> BufferedReader:
    """Open a regular file that lies in a directory, or below it by way of links.

    Raises OSError, which names no more of a path than `name`, or NotADelta.
    """
    if leads_out(os.path.realpath(directory), name):
        raise _outside()  # before it is opened: to open a device may do something
    try:
        root = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except OSError as error:
        raise OSError(error.errno, error.strerror) from error
    try:
        opened = os.open(name, FLAGS, dir_fd=root)
        try:
            if not _is_below(_place(opened), _place(root)):
                raise _outside()
            if not stat.S_ISREG(os.fstat(opened).st_mode):
                raise NotADelta("expected a regular file, got something else")
            return os.fdopen(opened, "rb")
        except BaseException:
            os.close(opened)
            raise
    finally:
        os.close(root)


def leads_out(directory: str, name: str) -> bool:
    """Say whether a name in a resolved directory leads out of it, be there something or not."""
    target = os.path.realpath(os.path.join(directory, name))
    return not _is_below(os.fsencode(target), os.fsencode(directory))


def _outside() -> NotADelta:
    """Return the one error of all links that lead out: it tells nothing of what is there."""
    return NotADelta("expected a file in the adapter directory, got a link that leads out of it")


def _is_below(path: bytes, directory: bytes) -> bool:
    return path.startswith(directory.rstrip(b"/") + b"/")


def _place(descriptor: int) -> bytes:
    """Return where an open file lies, links resolved."""
    if sys.platform == "darwin":
        import fcntl

        return fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")
    return os.readlink(b"/proc/self/fd/%d" % descriptor)
