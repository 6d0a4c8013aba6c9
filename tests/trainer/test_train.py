"""Whole runs on the tiny model: they learn, write a file, stop, and go on where they stopped."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from spieldose_kernels.base import Base
from spieldose_kernels.delta_file import read_delta
from spieldose_trainer import trainer
from spieldose_trainer.callbacks import StopOnInterrupt
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.errors import CheckpointError, ConfigError, Interrupted
from spieldose_trainer.trainer import Result, Trainer, train

from .configuration import Configure, configuration

COMMAND = shutil.which("spieldose", path=str(Path(sys.executable).parent))
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def unbroken(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same run from its first update to its last."""
    torch.set_num_threads(1)
    return train(configuration(tiny_directory, tmp_path_factory.mktemp("unbroken"))())


@pytest.fixture
def interrupt_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Let runs receive SIGINT during one update; None: no more."""

    def interrupt_in(update: int | None) -> None:
        monkeypatch.setattr(trainer, "StopOnInterrupt", lambda: Interrupting(update))

    return interrupt_in


class Interrupting(StopOnInterrupt):
    """Press Ctrl-C in the middle of one update."""

    def __init__(self, update: int | None) -> None:
        super().__init__()
        self.update = update

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.update:
            signal.raise_signal(signal.SIGINT)


def test_a_run_lowers_the_loss(configure: Configure) -> None:
    losses = train(configure(max_steps=25)).losses
    assert len(losses) == 25
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_a_runs_file_is_accepted_against_its_base(configure: Configure, tiny_base: Base) -> None:
    result = train(configure(max_steps=4, description="sums"))
    adapter = read_delta(result.file.read_bytes(), tiny_base.spec)
    assert set(adapter.modules) == set(tiny_base.spec.shapes)
    assert adapter.info.method == "spiel-ag"
    assert adapter.info.description == "sums"
    assert adapter.info.density == pytest.approx(0.05, rel=0.01)
    assert adapter.info.settings["max_steps"] == "4"


def test_a_runs_file_names_no_directory_of_its_maker(configure: Configure) -> None:
    config = configure(max_steps=1)
    settings = read_delta(train(config).file.read_bytes()).info.settings
    assert settings["data"] == config.data.name and settings["out"] == config.out.name
    assert settings["base"] == Path(config.base).name
    assert [name for name, value in settings.items() if "/" in value] == []
    assert str(config.out) in (config.folder / "report.json").read_text()


def test_a_runs_file_holds_the_trained_values(configure: Configure) -> None:
    result = train(configure(max_steps=4))
    written = read_delta(result.file.read_bytes()).modules
    for name, layer in result.model.layers.items():
        assert torch.equal(written[name].values, layer.values.detach())
        assert bool(written[name].values.any())


def test_a_chat_template_of_its_own_is_trained_with_and_kept(
    configure: Configure, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    trained = Trainer(
        configure(data=tmp_path / "chat.jsonl", chat_template=tmp_path / "chat.jinja", max_steps=1)
    )
    (example,) = trained.examples
    decode: Any = trained.base.tokenizer.decode
    assert decode(example.prompt + example.completion) == "user: Hi\nassistant: Hello\n<|end|>"
    trained.train()
    assert read_delta(trained.save().read_bytes()).info.chat_template == template


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{% if %}", "chat.jinja: expected a chat template that compiles"),
        (b"\xff", "chat_template: expected a readable UTF-8 file"),
        (None, "chat_template: expected a readable UTF-8 file"),
        (b"\n", "chat.jinja: expected a chat template, got an empty file"),
    ],
)
def test_a_chat_template_that_is_none_is_refused(
    configure: Configure, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "chat.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        Trainer(configure(chat_template=tmp_path / "chat.jinja"))


def test_a_finished_run_leaves_no_checkpoints(configure: Configure) -> None:
    config = configure(max_steps=4, checkpoint_every=2)
    train(config)
    assert not config.checkpoints.exists()


def test_the_base_is_left_as_it_was(configure: Configure, tiny_base: Base) -> None:
    model = train(configure(max_steps=4)).model
    for name, layer in model.base.layers.items():
        assert torch.equal(layer.weight.data, tiny_base.layers[name].weight.data)


def test_epochs_count_passes_over_the_data(configure: Configure) -> None:
    config = configure(max_steps=None, epochs=2.0, batch_size=4)  # 10 examples: 3 updates a pass
    assert len(train(config).losses) == 6


def test_accumulated_passes_see_the_gradient_of_one_big_batch(
    configure: Configure,
) -> None:
    whole = first_gradients(configure(batch_size=10, density=0.5))
    parts = first_gradients(configure(batch_size=2, accumulation=5, density=0.5))
    for name, gradient in whole.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("update", [1, 3, 6])  # within a phase, outside, at the end of one
def test_an_interrupted_run_resumes_to_the_same_bits(
    configure: Configure,
    interrupt_in: Callable[[int | None], None],
    unbroken: Result,
    update: int,
) -> None:
    interrupt_in(update)
    with pytest.raises(Interrupted):
        train(configure())
    interrupt_in(None)
    resumed = train(configure(resume=True))
    assert resumed.losses == unbroken.losses
    assert_same_deltas(resumed, unbroken)


def test_a_resumed_run_may_be_interrupted_again(
    configure: Configure, interrupt_in: Callable[[int | None], None], unbroken: Result
) -> None:
    for update in (2, 5):
        interrupt_in(update)
        with pytest.raises(Interrupted):
            train(configure(resume=update > 2))
    interrupt_in(None)
    assert_same_deltas(train(configure(resume=True)), unbroken)


def test_an_interrupted_run_says_where_it_stopped_and_how_to_go_on(
    configure: Configure, interrupt_in: Callable[[int | None], None]
) -> None:
    config = configure()
    interrupt_in(3)
    with pytest.raises(Interrupted, match=r"stopped after update 3 of 10; .*--resume"):
        train(config)
    assert [path.name for path in config.checkpoints.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not config.out.exists()


def test_an_interrupt_in_the_last_update_finishes_the_run(
    configure: Configure, interrupt_in: Callable[[int | None], None]
) -> None:
    interrupt_in(4)
    assert train(configure(max_steps=4)).file.exists()


def test_a_run_gives_sigint_back(configure: Configure) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(configure(max_steps=1))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_ends_the_run_at_once() -> None:
    stop = StopOnInterrupt()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_failed_after_its_last_update_is_finished_by_resuming(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, unbroken: Result
) -> None:
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="disk full"):
        patched.setattr(trainer, "write_delta", disk_full)
        train(configure())
    resumed = train(configure(resume=True))
    assert len(resumed.losses) == 10  # no update more
    assert_same_deltas(resumed, unbroken)


def test_a_leftover_checkpoint_is_not_trained_over(
    configure: Configure, interrupt_in: Callable[[int | None], None]
) -> None:
    config = configure()
    interrupt_in(3)
    with pytest.raises(Interrupted):
        train(config)
    with pytest.raises(ConfigError, match="checkpoint-3 holds an unfinished run: pass --resume"):
        train(config)


def test_resuming_needs_a_checkpoint(configure: Configure) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a checkpoint in .*sums.run/checkpoints .*got none"
    ):
        train(configure(resume=True))


def test_resuming_at_another_density_is_refused(
    configure: Configure, interrupt_in: Callable[[int | None], None]
) -> None:
    interrupt_in(1)
    with pytest.raises(Interrupted):
        train(configure())
    with pytest.raises(ConfigError, match=r"density: expected 0\.05 as in the run"):
        train(configure(resume=True, density=0.01))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("out", Path("adapter.bin")),
        ("density", 0.0),
        ("density", 1.5),
        ("density", float("nan")),
        ("learning_rate", -1e-3),
        ("warmup", 1.1),
        ("initial_rate", -0.1),
        ("batch_size", 0),
        ("accumulation", 0),
        ("max_length", 0),
        ("selection_steps", 0),
        ("checkpoint_every", 0),
        ("epochs", 0.0),
        ("max_steps", 0),
        ("weight_decay", -1.0),
        ("weight_decay", float("inf")),
        ("seed", -1),
        ("seed", 1 << 32),
        ("batch_size", 10**30),
        ("epochs", 1e308),
        ("reselect_every", 2),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(
    configure: Configure, field: str, value: object
) -> None:
    with pytest.raises(ConfigError) as error:
        configure(**{field: value})
    assert field in str(error.value)
    assert str(value) in str(error.value).partition("got")[2]


def test_the_command_explains_every_setting() -> None:
    done = spieldose("train", "--help")
    assert done.returncode == 0
    said = " ".join(done.stdout.replace("│", "").split())
    for field in dataclasses.fields(TrainConfig):
        flag = field.name.replace("_", "-")
        kind = r"(?:, --no-\S+|(?: \{[^}]*\})?(?:\|?[A-Z]+)?| \[STR \[STR \.\.\.\]\]| [A-Z]+)"
        found = re.findall(rf"--{flag}{kind} (.*?)\((?:default|required)", said)
        assert any(found), flag


def test_the_command_refuses_a_missing_data_file_in_one_line(configure: Configure) -> None:
    done = spieldose("train", *arguments(configure(), data="none.jsonl"))
    assert done.returncode == 1
    assert done.stderr.startswith("spieldose train: none.jsonl: expected a readable")
    assert done.stderr.count("\n") == 1


def test_the_command_refuses_a_setting_out_of_range_in_one_line(configure: Configure) -> None:
    done = spieldose("train", *arguments(configure(), density="2"))
    assert done.returncode == 1
    assert done.stderr == "spieldose train: density must be above 0 and at most 1, got 2.0\n"


def test_ctrl_c_stops_the_command_with_a_checkpoint(configure: Configure) -> None:
    config = configure()
    assert COMMAND is not None
    command = [COMMAND, "train", *arguments(config, max_steps="100000")]
    with subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        seen = b""
        while b"loss=" not in seen:  # the bar counts an update: it runs
            seen += running.stderr.read1()
        running.send_signal(signal.SIGINT)
        seen += running.stderr.read()
    assert running.returncode == 1
    last = seen.decode().splitlines()[-1]
    assert last.startswith("spieldose train: stopped after update ")
    assert "Traceback" not in seen.decode()
    assert any(config.checkpoints.glob("checkpoint-*"))


class Stop(TrainerCallback):
    """End a run after its first update."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def first_gradients(config: TrainConfig) -> dict[str, torch.Tensor]:
    """Return every layer's candidate sums after one update in which all weights are candidates."""
    run = Trainer(config)
    run._loop.add_callback(Stop())
    run.train()
    return {name: c.total for name, c in run._loop.recorder.selector.candidates.items()}


def assert_same_deltas(a: Result, b: Result) -> None:
    first, second = (read_delta(result.file.read_bytes()).modules for result in (a, b))
    for name, delta in first.items():
        assert torch.equal(delta.row_starts, second[name].row_starts)
        assert torch.equal(delta.columns.int(), second[name].columns.int())
        assert torch.equal(delta.values, second[name].values)


def disk_full(*_: Any) -> None:
    raise OSError("disk full")


def spieldose(*words: str) -> subprocess.CompletedProcess[str]:
    assert COMMAND is not None
    return subprocess.run(
        [COMMAND, *words], env=ONE_THREAD, capture_output=True, text=True, timeout=120
    )


def arguments(config: TrainConfig, **changes: str) -> list[str]:
    """Spell a configuration as the command line has it."""
    names = ("base", "data", "out", "density", "max_steps", "batch_size", "device")
    settings = {name: str(getattr(config, name)) for name in names} | changes
    return [w for name, v in settings.items() for w in (f"--{name.replace('_', '-')}", v)]
