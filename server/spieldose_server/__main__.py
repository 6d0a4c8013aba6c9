"""Where the `spieldose` command begins."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper


def main() -> None:
    """Run the command; what becomes of its terminal ends it in a line at most."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks
    with _dying_at_once():
        from spieldose_server.command_line import main as run
    try:
        run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Python would try to write what is left once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1 if error.errno == errno.EPIPE else f"spieldose: {error}")


@contextmanager
def _dying_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process without a traceback while modules are imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
