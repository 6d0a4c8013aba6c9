"""What may stand where a file is to keep text."""

from spieldose_trainer.errors import ConfigError


def is_text(words: str) -> bool:
    """Say whether UTF-8 can hold these words: JSON and command lines know halves of characters."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(name: str, words: str) -> None:
    """Raise ConfigError for a setting that no file could keep, or be called."""
    if not is_text(words) or "\0" in words:
        raise ConfigError(f"{name} must be Unicode text, got {words}")


def check_line(name: str, words: str) -> None:
    """Raise ConfigError for a setting that is not one line of text."""
    check_text(name, words)
    if words.splitlines() not in ([], [words]):
        raise ConfigError(f"{name} must be one line, got {words}")
