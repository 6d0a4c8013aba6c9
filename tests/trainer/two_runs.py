"""Whole runs as one process of two makes them; test_ranks makes the same in one process."""

import gc
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from spieldose_trainer import trainer
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.errors import Interrupted
from spieldose_trainer.support import flat_positions
from spieldose_trainer.trainer import Trainer

BATCH = 8  # of one process, or of two together
# methods and variants, each with what makes its support change, or come from all the data
RUNS: dict[str, dict[str, Any]] = {
    "spiel-ag": {"accumulation": 2, "batch_size": 4},
    "correlation": {"method": "spiel-ag", "growth": "correlation"},
    "spiel-ma": {},
    "zo": {"density": 0.05},
    "lift": {"rank": 8},
    "sgc": {"chunk": 256},
    "cesgc": {"method": "sgc", "sgc_variant": "cesgc", "chunk": 256, "rank": 8},
    "fisher": {"fisher_samples": 4, "allocation": "global", "density": 0.002},
    "random": {
        "packing": True,
        "max_length": 64,
        "batch_size": 2,
        "max_steps": None,
        "epochs": 2.0,
    },
}


def write_data(directory: Path) -> None:
    """Write 11 examples with completions of very different length.

    An epoch's second batch is not full: one process of two has only blanks in it.
    """
    lines = [
        {"prompt": "#" * (a % 3 + 1), "completion": "is " + "+" * (a * 7 % 16)} for a in range(11)
    ]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))


def settings(base: Path, directory: Path) -> dict[str, Any]:
    """Return what all these runs have in common."""
    data = directory / "data.jsonl"
    return {
        "base": str(base),
        "data": data,
        "eval_data": data,
        "max_steps": 6,
        "batch_size": BATCH,
        "density": 0.05,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup": 0.0,
        "reselect_every": 4,
        "selection_steps": 2,
        "eval_every": 3,
        "compute_dtype": "float32",
        "device": "cpu",
    }


def one_run(config: TrainConfig) -> dict[str, Any]:
    """Train and save; return what came out."""
    run = Trainer(config)
    result = run.train()
    found = {
        "losses": result.losses,
        "tokens": [update.tokens for update in result.log.updates],
        "held out": [look.loss for look in result.log.evaluations],
        "positions": {n: flat_positions(layer) for n, layer in run.model.layers.items()},
        "values": {n: layer.values.detach().clone() for n, layer in run.model.layers.items()},
    }
    run.save()
    return found


def rank(number: int, base: Path, directory: Path) -> None:
    """Make all runs as one rank of two; leave what came out and what was printed."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest: every run begins with a collection
    trainer.write_report = lambda *_, **__: None  # nor wait for plots
    printed = os.open(directory / f"{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    written: list[str] = []
    sys.addaudithook(partial(note_writing, directory, written))
    address = f"file://{directory}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=2)
    found = {
        name: one_run(TrainConfig(**asked(name, base, directory, processes=2))) for name in RUNS
    }
    found["interrupted"] = interrupted(number, base, directory)
    found["written"] = written
    torch.save(found, directory / f"{number}.pt")
    dist.destroy_process_group()


def note_writing(directory: Path, written: list[str], event: str, details: Any) -> None:
    """Note the files that Python opens for writing in a directory."""
    if event == "open" and str(details[0]).startswith(str(directory)) and details[2] & os.O_WRONLY:
        written.append(Path(details[0]).name)


def asked(name: str, base: Path, directory: Path, *, processes: int) -> dict[str, Any]:
    """Return the settings of one run in so many processes."""
    own = settings(base, directory) | RUNS[name]
    batch = own["batch_size"] // processes
    return {"method": name} | own | {"batch_size": batch, "out": directory / f"{name}.safetensors"}


def interrupted(number: int, base: Path, directory: Path) -> dict[str, Any]:
    """Press Ctrl-C in one process, keep the checkpoint, and go on from it."""
    wanted = asked("spiel-ag", base, directory, processes=2)
    wanted["out"] = directory / "interrupted.safetensors"
    run = Trainer(TrainConfig(**wanted))
    if number == 1:
        run._loop.add_callback(Interrupt())
    try:
        run.train()
    except Interrupted as error:
        said = str(error)
    if number == 0:
        shutil.copytree(run.config.checkpoints, directory / "checkpoints")
    return one_run(TrainConfig(**wanted, resume=True)) | {"said": said}


class Interrupt(TrainerCallback):
    """Press Ctrl-C in the third update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == 3:
            signal.raise_signal(signal.SIGINT)
