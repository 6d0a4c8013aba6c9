"""The settings of a short run on the tiny model, with phases 1-2, 5-6 and 9-10."""

import json
from collections.abc import Callable
from pathlib import Path

from spieldose_trainer.config import TrainConfig

Configure = Callable[..., TrainConfig]


def configuration(base: Path, directory: Path) -> Configure:
    data = directory / "data.jsonl"
    lines = [{"prompt": f"{a}+", "completion": f"is {a * 3}"} for a in range(10)]
    data.write_text("\n".join(map(json.dumps, lines)))
    settings = {
        "base": str(base),
        "data": data,
        "out": directory / "out" / "sums.safetensors",
        "density": 0.05,
        "max_steps": 10,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "reselect_every": 4,
        "selection_steps": 2,
        "schedule": "constant",  # the last updates count as much as the first
        "compute_dtype": "float32",
        "device": "cpu",
    }
    return lambda **changes: TrainConfig(**{**settings, **changes})
