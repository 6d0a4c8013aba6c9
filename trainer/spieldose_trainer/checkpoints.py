"""A run's checkpoints on disk: which is the newest whole one, and which may go."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Final

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

DELTA: Final = "delta.safetensors"  # beside what Hugging Face's Trainer writes
RUN_STATE: Final = "run.pt"
DIGESTS: Final = "sha256.json"  # of the files in a checkpoint, by name; written last
PROCESSES: Final = "processes"  # a setting of the delta's, beside those of the run's own


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in a directory, if there is one.

    Others were cut short by a crash or a full disk, or damaged since.
    """
    whole = filter(_is_whole, directory.glob("checkpoint-*"))
    return max(whole, key=_update, default=None)


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


def _is_whole(checkpoint: Path) -> bool:
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text())
        return all(_digest(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
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
