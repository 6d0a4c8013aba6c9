"""A run's checkpoints on disk: which is the newest whole one, and which may go."""

import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from transformers import TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from spieldose_kernels.delta_file import read_delta
from spieldose_kernels.errors import DeltaError

DELTA: Final = "delta.safetensors"  # beside what Hugging Face's Trainer writes
RUN_STATE: Final = "run.pt"
PROCESSES: Final = "processes"  # a setting of the delta's, beside those of the run's own
# what reading a file raises that is cut short or damaged
UNREADABLE: Final = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    DeltaError,
)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in a directory, if there is one.

    Others were cut short by a crash or a full disk, or damaged since.
    """
    found = {path: _update(path) for path in directory.glob("checkpoint-*")}
    whole = {path: update for path, update in found.items() if update is not None}
    return max(whole, key=lambda path: whole[path], default=None)


def keep_only(checkpoint: Path) -> None:
    """Make sure that a new checkpoint is on the disk, then remove all others beside it."""
    for path in (*checkpoint.iterdir(), checkpoint, checkpoint.parent):
        _sync(path)
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint:
            shutil.rmtree(other, ignore_errors=True)


def _update(checkpoint: Path) -> int | None:
    """Return the update after which a checkpoint was written; None if it is not whole."""
    try:
        settings = read_delta((checkpoint / DELTA).read_bytes()).info.settings
        for name in (RUN_STATE, OPTIMIZER_NAME, SCHEDULER_NAME, *_random_states(settings)):
            with zipfile.ZipFile(checkpoint / name) as archive:  # as torch.save writes it
                if archive.testzip() is not None:
                    return None
            with safe_globals():  # NumPy's, of its random generator
                torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        TrainerControl.from_state(state.stateful_callbacks[TrainerControl.__name__])
        return int(state.global_step)
    except UNREADABLE:
        return None


def _random_states(settings: Mapping[str, str]) -> list[str]:
    """Return the files that hold the processes' random generators."""
    processes = int(settings.get(PROCESSES, 1))
    if processes == 1:
        return ["rng_state.pth"]
    return [f"rng_state_{rank}.pth" for rank in range(processes)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
