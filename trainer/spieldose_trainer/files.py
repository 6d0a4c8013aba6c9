"""The files of a run as its settings name them: which it reads, and where it will write."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import temporary_beside
from spieldose_trainer import delta_path
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import read_text
from spieldose_trainer.errors import ConfigError


def check_files(config: TrainConfig) -> Adapter | None:
    """Return the adapter that a run is to build on, if there is one.

    Raises ConfigError, DataError or DeltaError for files that cannot be read or written.
    """
    check_places(config)
    read_template(config.chat_template)
    for path in (config.data, config.eval_data, config.fisher_data):
        if path is not None:
            read_text(path)
    return None if config.over is None else delta_path.read(config.over)


def check_places(config: TrainConfig) -> None:
    """Raise ConfigError where a run cannot write, or would write over what it reads."""
    reads: dict[str, Path | str | None] = {
        "base": config.base,
        "data": config.data,
        "over": config.over,
        "eval_data": config.eval_data,
        "fisher_data": config.fisher_data,
        "chat_template": config.chat_template,
    }
    check_out(config.out, reads=reads)
    for name, path in reads.items():
        if path is not None and config.folder.resolve() in Path(path).resolve().parents:
            raise ConfigError(
                f"{name}: expected a place outside {config.folder}, which the run clears, "
                f"got {path}"
            )


def check_out(out: Path, *, reads: Mapping[str, Path | str | None]) -> None:
    """Raise ConfigError for an `out` that cannot be a file's name, or where none can be made.

    Nor may it be one of the files that are read, or one in a directory that is.
    """
    with _writing():
        if out.is_dir():
            raise ConfigError(f"out: expected a file to write, got the directory {out}")
        for name, path in reads.items():
            if path is not None and out.exists() and _holds(Path(path), out):
                raise ConfigError(f"out: expected another file than those of {name}, got {out}")
        temporary_beside(out).exists()  # its name is the longest
        above = next(path for path in out.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(f"out: expected a place to write to, got {above}")


def make_folders(config: TrainConfig) -> None:
    """Make the run's directories; raises ConfigError if nothing could be written at its end."""
    with _writing():
        config.checkpoints.mkdir(parents=True, exist_ok=True)


def lock(config: TrainConfig) -> int:
    """Keep other processes from this run's files until the file descriptor returned is closed.

    Raises ConfigError if one has done so.
    """
    with _writing():
        descriptor = os.open(config.checkpoints / "lock", os.O_WRONLY | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"out: expected a file that no other run is to write, got {config.out}"
        ) from error
    return descriptor


def read_template(path: Path | None) -> str:
    """Return a chat template, "" for none. Raises ConfigError."""
    if path is None:
        return ""
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: expected a readable UTF-8 file, got {error}") from error
    if not template.strip():
        raise ConfigError(f"{path}: expected a chat template, got an empty file")
    try:
        _compile_jinja_template(template)
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise ConfigError(
            f"{path}: expected a chat template that compiles, got: {error}"
        ) from error
    return template


def _holds(path: Path, file: Path) -> bool:
    """Say whether a file is there at a path, or directly in its directory."""
    return path.exists() and (path.samefile(file) or path.samefile(file.resolve().parent))


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"out: expected a place to write to, got: {error}") from error
