"""How the server's log reads: a line of text for people, or a JSON object for collectors."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

from spieldose_server.config import LogFormat


class TextFormatter(logging.Formatter):
    """Write a record on one line, whatever a client put into it; a traceback follows on its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def set_up_logging(kind: LogFormat) -> None:
    """Log to stderr, libraries' warnings too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(kind))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)


def formatter(kind: LogFormat) -> logging.Formatter:
    """Return the formatter of a kind; JSON has the times in UTC, and what a record has extra."""
    if kind == "text":
        return TextFormatter("%(asctime)s %(levelname)s %(message)s")
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
    )


def printable(text: str) -> str:
    """Return a text with its control characters escaped, so that it stays on its line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
