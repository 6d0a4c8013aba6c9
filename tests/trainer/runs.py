"""What tests of whole runs share: how to stop one, and how to tell that two came out the same."""

import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from spieldose_kernels.delta import Adapter
from spieldose_kernels.delta_file import read_delta
from spieldose_trainer import loop
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.errors import Interrupted
from spieldose_trainer.evaluation import Measured
from spieldose_trainer.trainer import Result, Trainer


class Interrupt(TrainerCallback):
    """Press Ctrl-C in the middle of one update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.update:
            signal.raise_signal(signal.SIGINT)


def run(config: TrainConfig, *callbacks: TrainerCallback, base: Any = None) -> Result:
    """Train and write the delta file, with callbacks of the test's own."""
    trainer = Trainer(config, base=base)
    for callback in callbacks:
        trainer._loop.add_callback(callback)
    result = trainer.train()
    trainer.save()
    return result


def interrupt(config: TrainConfig, *, update: int, base: Any = None) -> None:
    """Train up to this update and leave a checkpoint."""
    with pytest.raises(Interrupted):
        run(config, Interrupt(update), base=base)


def evaluated_as(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Let a run's evaluations find these losses."""
    looks = iter([Measured(loss=loss, tokens=1, exact_match=None) for loss in losses])
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: next(looks))


def adapter_of(result: Result) -> Adapter:
    return read_delta(result.file.read_bytes())


def assert_same_run(a: Result, b: Result) -> None:
    """Demand the same losses, reselections and evaluations, and the same deltas, bit for bit."""
    assert a.losses == b.losses
    assert a.log.reselections == b.log.reselections
    assert a.log.evaluations == b.log.evaluations
    assert_same_deltas(adapter_of(a), adapter_of(b))
    for name, layer in a.model.layers.items():
        assert torch.equal(layer.born, b.model.layers[name].born)


def assert_same_deltas(a: Adapter, b: Adapter) -> None:
    assert a.modules.keys() == b.modules.keys()
    for name, delta in a.modules.items():
        assert torch.equal(delta.flat(), b.modules[name].flat())
        assert torch.equal(delta.values, b.modules[name].values)


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path
