"""The trainer without its command: five lines, and selectors and updaters by themselves."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import spieldose_trainer
from spieldose_kernels.base import Base
from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.delta_file import read_delta
from spieldose_kernels.linear import DeltaLinear, TrainableDelta
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.selectors.accumulated_gradients import AccumulatedGradients
from spieldose_trainer.selectors.schedule import ReselectionSchedule
from spieldose_trainer.support import flat_positions
from spieldose_trainer.updaters.adamw import SparseAdamW

from .configuration import Configure
from .runs import adapter_of, assert_same_deltas, run

pytestmark = pytest.mark.usefixtures("no_report")


def test_five_lines_train_an_adapter(configure: Configure) -> None:
    from spieldose_trainer import TrainConfig, Trainer

    asked = configure()
    config = TrainConfig(base=asked.base, data=asked.data, out=asked.out, max_steps=2)
    trainer = Trainer(config)
    result = trainer.train()
    file = trainer.save()
    assert file == result.file == asked.out and len(result.losses) == 2
    assert read_delta(file.read_bytes()).info.method == "spiel-ag"


def test_paths_may_be_strings(configure: Configure) -> None:
    paths = {name: str(getattr(configure(), name)) for name in ("data", "out")}
    paths |= dict.fromkeys(("eval_data", "fisher_data", "chat_template"), "a")
    config = configure(method="fisher", **paths)
    assert all(getattr(config, name) == Path(path) for name, path in paths.items())


def test_a_base_that_is_already_there_is_trained_over(
    configure: Configure, tiny_base: Base
) -> None:
    trainer = spieldose_trainer.Trainer(configure(max_steps=2), base=tiny_base)
    assert trainer.base is tiny_base
    assert len(trainer.train().losses) == 2


def test_runs_that_share_a_base_are_as_if_alone(
    configure: Configure, tiny_base: Base, tmp_path: Path
) -> None:
    configs = [configure(seed=seed, out=tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    alone = [adapter_of(run(config)) for config in configs]
    trainers = [spieldose_trainer.Trainer(config, base=tiny_base) for config in configs]
    for trainer, expected in zip(trainers, alone, strict=True):
        trainer.train()
        assert_same_deltas(trainer.adapter(), expected)


def test_a_base_that_is_not_the_named_one_is_refused(
    configure: Configure, tiny_base: Base, plain: Base
) -> None:
    other = replace(tiny_base, spec=replace(tiny_base.spec, name="other", fingerprint="f" * 64))
    with pytest.raises(ConfigError, match=r"base: expected .*, got other, of f{12}$"):
        spieldose_trainer.Trainer(configure(), base=other)
    with pytest.raises(ConfigError, match="expected one with quantised=True, got False"):
        spieldose_trainer.Trainer(configure(), base=plain)


def test_one_call_trains_and_writes(configure: Configure) -> None:
    assert spieldose_trainer.train(configure(max_steps=2)).file.exists()


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Selector'"):
        _ = spieldose_trainer.Selector


def test_the_commands_help_waits_for_no_heavy_import() -> None:
    heavy = "[name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]"
    code = (
        "import sys, spieldose_trainer.command_line\n"
        "try: spieldose_trainer.command_line.train(['--help'])\n"
        f"finally: sys.exit(str({heavy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "--learning-rate" in done.stdout
    assert done.stderr == "[]\n"


class Plain(nn.Module):
    """A model of two frozen layers, one of them with a delta beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 12).requires_grad_(False)
        positions = torch.randperm(120)[:24]
        support = SparseDelta.from_flat(positions, torch.zeros(24), shape=(12, 10))
        self.delta = TrainableDelta(support.row_starts, support.columns.int(), width=10)
        self.over = DeltaLinear(self.first, self.delta)
        self.last = nn.Linear(12, 12).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.over(x).tanh())
        return out


def test_selector_and_updater_work_in_any_loop() -> None:
    torch.manual_seed(0)
    model, wanted = Plain(), Plain()
    x = torch.randn(64, 10)
    with torch.no_grad():
        wanted.load_state_dict(model.state_dict())
        places = torch.tensor([7, 33, 58, 61, 90, 117])  # entries of W that the target has moved
        wanted.first.weight.view(-1)[places] += 2.0
        target = wanted(x)
    updater = SparseAdamW([model.delta.values], lr=5e-2)
    schedule = ReselectionSchedule(every=10, steps=2, initial_rate=0.3, decay="linear", total=200)
    selector = AccumulatedGradients({"over": model.delta}, updater=updater, schedule=schedule)
    losses = []
    for update in range(1, 201):
        selector.begin_update(update)
        loss = (model(x) - target).square().mean()
        updater.zero_grad()
        loss.backward()
        updater.step()
        selector.end_update(update)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
    assert bool(torch.isin(places, flat_positions(model.delta)).all())
