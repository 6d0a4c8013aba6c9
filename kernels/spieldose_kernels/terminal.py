"""What a model or a file says, on a terminal: its control characters are shown, not obeyed.

An escape sequence could retitle the window, hide what follows, or type for whoever sits there.
"""

import sys
import unicodedata

KEPT = "\n\t"


def say(text: str) -> None:
    """Print a piece of a text at once; what goes to a file or a pipe stays as it is."""
    print(harmless(text) if sys.stdout.isatty() else text, end="", flush=True)


def harmless(text: str) -> str:
    """Return a text with its control characters written out, as \\x1b."""
    return "".join(
        ascii(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in KEPT else c for c in text
    )
