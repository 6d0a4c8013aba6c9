"""A run's checkpoints on disk: which is the newest whole one, and which may go."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from spieldose_kernels.delta_file import read_delta

DELTA: Final = "delta.safetensors"  # beside what Hugging Face's Trainer writes
RUN_STATE: Final = "run.pt"
DIGESTS: Final = "sha256.json"  # of the files in a checkpoint, by name; written last
PROCESSES: Final = "processes"  # a setting of the delta's, beside those of the run's own
STARTED: Final = "started"  # another: local time in ISO 8601, which chat templates may show


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in a directory, if there is one.

    Others were cut short by a crash or a full disk, or damaged since.
    """
    whole = (path for path in directory.glob("checkpoint-*") if damage(path) is None)
    return max(whole, key=_update, default=None)


def damage(checkpoint: Path) -> str | None:
    """Name a file that a checkpoint lacks, or that is not as it was written; None: it is whole."""
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text())
    except (OSError, ValueError):
        return DIGESTS
    if not (isinstance(digests, dict) and {DELTA, RUN_STATE, TRAINER_STATE_NAME} <= digests.keys()):
        return DIGESTS
    return next((name for name in digests if not _is_as(checkpoint / name, digests[name])), None)


def saved_settings(checkpoint: Path) -> Mapping[str, str]:
    """Return the settings of the run that wrote a whole checkpoint."""
    return read_delta((checkpoint / DELTA).read_bytes()).info.settings


def seal(checkpoint: Path) -> None:
    """Write down what the files of a checkpoint hold; before that it is not whole."""
    digests = {path.name: _digest(path) for path in checkpoint.iterdir()}
    (checkpoint / DIGESTS).write_text(json.dumps(digests))


def keep_only(checkpoint: Path) -> None:
    """Make sure that a new checkpoint is on the disk, then remove all others beside it."""
    for path in (*checkpoint.iterdir(), checkpoint, checkpoint.parent):
        _sync(path)
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            shutil.rmtree(other, ignore_errors=True)


def link(file: Path, other: Path) -> None:
    """Give a file a second name, or a copy where file systems have no links."""
    other.unlink(missing_ok=True)
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _is_as(file: Path, digest: str) -> bool:
    try:
        return _digest(file) == digest
    except OSError:
        return False


def _update(checkpoint: Path) -> int:
    """Return the update after which a whole checkpoint was written."""
    return int(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step)


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
