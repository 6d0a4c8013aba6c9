"""What a run leaves beside its delta file, and what a plan says before there is a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from spieldose_trainer import command_line, trainer
from spieldose_trainer.errors import CheckpointError, Interrupted
from spieldose_trainer.trainer import Trainer, train

from .configuration import Configure, configuration
from .runs import Interrupt, evaluated_as, run


def test_the_folder_holds_the_delta_file_and_the_report(configure: Configure) -> None:
    config = configure(description="<sums>")
    train(config)
    assert (config.folder / config.out.name).read_bytes() == config.out.read_bytes()
    report = json.loads((config.folder / "report.json").read_text())
    assert len(report["log"]["updates"]["loss"]) == 10
    page = (config.folder / "report.html").read_text()
    assert "&lt;sums&gt;" in page and "<sums>" not in page


def test_tensorboard_shows_the_losses(configure: Configure) -> None:
    config = configure(max_steps=3)
    losses = train(config).losses
    log = EventAccumulator(str(config.folder / "tensorboard")).Reload()
    shown = [event.value for event in log.Scalars("train/loss")]
    assert shown == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("method", "bytes_per_value"), [("spiel-ag", 12), ("zo", 0)])
def test_the_memory_of_moments_is_measured(
    configure: Configure, method: str, bytes_per_value: int
) -> None:
    trainer = Trainer(configure(method=method, selector=None, density=0.05, max_steps=3))
    trainer.train()
    trainer.save()
    assert trainer.memory is not None
    assert trainer.memory.moments == bytes_per_value * trainer.memory.entries


def test_spiel_ma_keeps_no_state_per_value(configure: Configure) -> None:
    memories = []
    for method in ("spiel-ma", "spiel-ag"):
        trainer = Trainer(configure(method=method, max_steps=3, out=configure().out))
        trainer.train()
        trainer.save()
        memories.append(trainer.memory)
    momentum, gradients = memories
    assert momentum is not None and gradients is not None
    rows_and_columns = sum(sum(layer.shape) for layer in trainer.model.layers.values())
    assert momentum.moments == 4 * rows_and_columns
    assert momentum.moments <= gradients.moments / 2


def test_a_run_that_evicts_deltas_reports_what_they_were_worth(configure: Configure) -> None:
    config = configure(method="sgc", chunk=256, density=0.01, max_steps=4)
    train(config)
    report = json.loads((config.folder / "report.json").read_text())
    lost = report["log"]["reselections"]["lost_over_run"]
    assert 0 < lost[-1] < 1
    assert f", {lost[-1]:.1%} over the whole run." in (config.folder / "report.html").read_text()


@pytest.mark.parametrize("interrupted", [False, True])
def test_ages_are_those_of_the_best_deltas(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """With phases 1-2, 5-6 and 9-10 the support changes twice more after the best."""
    seen = []
    monkeypatch.setattr(trainer, "write_report", lambda *_, born, **__: seen.append(born))
    evaluated_as(monkeypatch, 3, 1, 2)
    settings = {"eval_data": configure().data, "eval_every": 5}
    best = Born(5)
    if interrupted:
        with pytest.raises(Interrupted):
            run(configure(**settings), best, Interrupt(7))
    result = run(configure(**settings, resume=interrupted), *([] if interrupted else [best]))
    assert [look.update for look in result.log.evaluations] == [0, 5, 10]
    (found,) = seen
    assert found.keys() == best.born.keys()
    assert all(torch.equal(found[name], born) for name, born in best.born.items())
    assert {int(born.max()) for born in found.values()} == {1}


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((1, 2), "; deltas of update 0, whose held-out loss was lowest: all zero; report: "),
        ((2, 1), "; deltas of update 3, whose held-out loss was lowest; report: "),
        ((), "; report: "),
    ],
)
@pytest.mark.usefixtures("no_report")
def test_the_command_says_which_deltas_it_wrote(
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    losses: tuple[float, ...],
    said: str,
) -> None:
    evaluated_as(monkeypatch, *losses)
    config = configure()
    words = f"--base {config.base} --data {config.data} --out {config.out}"
    words += " --method random --max-steps 3"
    command_line.train([*words.split(), *(["--eval-data", str(config.data)] if losses else [])])
    first, *_ = capsys.readouterr().out.splitlines()
    number = r"loss \d+\.\d{4}"
    assert re.search(number + re.escape(f"{said}{config.folder}/report.html") + "$", first)


class Born(TrainerCallback):
    """Keep the ages of a support as they are after one update."""

    def __init__(self, update: int) -> None:
        self.update = update
        self.born: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            layers = kwargs["model"].layers
            self.born = {name: layer.born.clone() for name, layer in layers.items()}


def test_a_plan_loads_nothing(
    tiny_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded")

    monkeypatch.setattr(trainer, "load_base", forbidden)
    config = configuration(tiny_directory, tmp_path)()
    command_line.train(
        ["--base", config.base, "--data", str(config.data), "--out", str(config.out), "--plan"]
    )
    assert "q_proj" in capsys.readouterr().out
    assert not config.folder.exists()


def test_a_run_that_failed_after_its_last_update_is_reported_by_resuming(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="disk full"):
        patched.setattr(trainer, "write_delta", disk_full)
        train(configure())
    train(configure(resume=True))
    report = json.loads((configure().folder / "report.json").read_text())
    assert report["memory"]["moments"] == 12 * report["memory"]["entries"]
    assert len(report["log"]["updates"]["loss"]) == 10
