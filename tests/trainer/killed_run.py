"""A run killed while it writes a checkpoint; test_failures starts it and goes on with it."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from configuration import configuration

from spieldose_trainer import trainer

save = torch.save


def train(base: Path, directory: Path) -> None:
    """Train until the second checkpoint has half of its moments."""
    torch.set_num_threads(1)
    torch.save = die
    trainer.train(configuration(base, directory)(checkpoint_every=3))


def die(state: Any, path: Any, *arguments: Any, **settings: Any) -> None:
    save(state, path, *arguments, **settings)
    if str(path).endswith("checkpoint-6/optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
