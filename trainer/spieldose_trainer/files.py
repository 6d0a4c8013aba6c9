"""The files of a run as its settings name them: which it reads, and where it will write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template

from spieldose_kernels.delta_file import temporary_beside
from spieldose_trainer import delta_path
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import read_text
from spieldose_trainer.errors import ConfigError


def check_files(config: TrainConfig) -> None:
    """Raise ConfigError, DataError or DeltaError for files that cannot be read or written."""
    check_out(config)
    read_template(config.chat_template)
    if config.over is not None:
        delta_path.read(config.over)
    for path in (config.data, config.eval_data, config.fisher_data):
        if path is not None:
            read_text(path)


def check_out(config: TrainConfig) -> None:
    """Raise ConfigError for an `out` that cannot be a file's name."""
    with _writing():
        if config.out.is_dir():
            raise ConfigError(f"out: expected a file to write, got the directory {config.out}")
        temporary_beside(config.out).exists()  # its name is the longest


def make_folders(config: TrainConfig) -> None:
    """Make the run's directories; raises ConfigError if nothing could be written at its end."""
    with _writing():
        config.checkpoints.mkdir(parents=True, exist_ok=True)


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
    except (TemplateError, RecursionError) as error:
        raise ConfigError(
            f"{path}: expected a chat template that compiles, got: {error}"
        ) from error
    return template


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"out: expected a place to write to, got: {error}") from error
