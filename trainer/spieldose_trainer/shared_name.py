"""What a model is called in files that travel."""

from pathlib import Path


def shared_name(model: str) -> str:
    """Return a model's hub name, or of its directory the last part: the rest says whose it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model
