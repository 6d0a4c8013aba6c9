"""Delta files by path: every error names the file."""

from pathlib import Path

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.errors import DeltaError, NotADelta
from spieldose_trainer.errors import ConversionError


def read(path: Path, base: BaseSpec | None = None) -> Adapter:
    """Read and fully validate a delta file, against `base` unless it is None; raises DeltaError."""
    try:
        with open(path, "rb") as file:
            return read_delta(file, base)
    except OSError as error:
        raise NotADelta(f"expected a readable delta file, got: {error}") from error
    except DeltaError as error:
        raise type(error)(f"{path}: {error}") from error


def write(path: Path, adapter: Adapter) -> None:
    """Write a delta file, and the directories above it; raises ConversionError or DeltaError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_delta(path, adapter)
    except OSError as error:
        raise ConversionError(f"expected to write {path}: {error}") from error
    except DeltaError as error:
        raise type(error)(f"{path} is not written: {error}") from error
