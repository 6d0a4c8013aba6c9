"""A run that fails says why in one line and loses nothing that a checkpoint held."""

import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.errors import BaseError, SpieldoseError
from spieldose_trainer import command_line, trainer
from spieldose_trainer.checkpoints import newest_checkpoint
from spieldose_trainer.errors import CheckpointError, ConfigError, DataError, NonFiniteLoss
from spieldose_trainer.planning import make_plan
from spieldose_trainer.trainer import Result, Trainer

from .configuration import Configure, configuration
from .runs import assert_same_run, evaluated_as, interrupt, run, write_lines

pytestmark = pytest.mark.usefixtures("no_report")

TOGETHER = {"prompt": "a", "completion": "b"}


@pytest.fixture(scope="module")
def unbroken(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same run from its first update to its last."""
    torch.set_num_threads(1)
    return run(configuration(tiny_directory, tmp_path_factory.mktemp("unbroken"))())


@pytest.fixture(scope="module")
def two_checkpoints(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints after updates 3 and 6 of one run."""
    directory = tmp_path_factory.mktemp("two")
    make = configuration(tiny_directory, directory)
    interrupt(make(), update=3)
    kept = make().checkpoints / "checkpoint-3"
    shutil.copytree(kept, directory / "checkpoint-3")
    interrupt(make(resume=True), update=6)
    shutil.copytree(directory / "checkpoint-3", kept)
    return make().checkpoints


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail that loads the base."""

    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the base was loaded")

    monkeypatch.setattr(trainer, "load_base", load)


class Spoil(TrainerCallback):
    """Make something of a run not a number in one update."""

    def __init__(self, update: int, what: Callable[[Any], torch.Tensor]) -> None:
        self.update = update
        self.what = what

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.update:
            *_, last = kwargs["model"].layers.values()
            self.what(last.values)[0] = float("nan")


class Limit(TrainerCallback):
    """Let no file grow beyond so many bytes, as on a full disk, from one update on."""

    def __init__(self, update: int, size: int) -> None:
        self.update = update
        self.size = size

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.update:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


class Barred(TrainerCallback):
    """Put a file in a folder's place in one update."""

    def __init__(self, update: int, folder: Path) -> None:
        self.update = update
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.update:
            shutil.rmtree(self.folder)
            self.folder.touch()


@contextmanager
def room_again() -> Iterator[None]:
    """Lift the limit at the end of the block."""
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def test_a_whole_checkpoint_is_what_a_run_goes_on_from(two_checkpoints: Path) -> None:
    assert newest_checkpoint(two_checkpoints) == two_checkpoints / "checkpoint-6"


PARTS = [
    "delta.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "run.pt",
    "scheduler.pt",
    "trainer_state.json",
    "sha256.json",
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("left", [None, 0, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(
    two_checkpoints: Path, tmp_path: Path, part: str, left: float | None
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "both")
    cut_short(tmp_path / "both" / "checkpoint-6" / part, left)
    assert newest_checkpoint(tmp_path / "both") == tmp_path / "both" / "checkpoint-3"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("where", [0, 0.3, 0.9])
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_for_the_one_before(
    two_checkpoints: Path, tmp_path: Path, part: str, where: float
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "both")
    path = tmp_path / "both" / "checkpoint-6" / part
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path / "both") == tmp_path / "both" / "checkpoint-3"


def test_every_file_of_a_checkpoint_is_looked_at(two_checkpoints: Path) -> None:
    assert {path.name for path in (two_checkpoints / "checkpoint-6").iterdir()} == {*PARTS}


def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bits(
    configure: Configure, two_checkpoints: Path, unbroken: Result
) -> None:
    config = configure(resume=True)
    shutil.copytree(two_checkpoints, config.checkpoints)
    cut_short(config.checkpoints / "checkpoint-6" / "optimizer.pt", 0.9)
    assert_same_run(run(config), unbroken)


def test_nothing_whole_is_nothing_to_resume_from(
    configure: Configure, two_checkpoints: Path
) -> None:
    config = configure(resume=True)
    shutil.copytree(two_checkpoints, config.checkpoints)
    for checkpoint in config.checkpoints.glob("checkpoint-*"):
        cut_short(checkpoint / "run.pt", None)
    said = "got checkpoint-3 without a whole run.pt, checkpoint-6 without a whole run.pt"
    with pytest.raises(ConfigError, match=f"expected a checkpoint in .* to resume from, {said}"):
        Trainer(config)
    shutil.rmtree(config.checkpoints)
    with pytest.raises(ConfigError, match=r"expected a checkpoint in .* to resume from, got none"):
        Trainer(config)


@pytest.mark.parametrize("digests", ["{}", "[]", "7", '{"run.pt": 7}'])
def test_digests_that_are_none_make_no_checkpoint_whole(
    two_checkpoints: Path, tmp_path: Path, digests: str
) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "both")
    (tmp_path / "both" / "checkpoint-6" / "sha256.json").write_text(digests)
    assert newest_checkpoint(tmp_path / "both") == tmp_path / "both" / "checkpoint-3"


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    processes: Any, tiny_directory: Path, tmp_path: Path, unbroken: Result
) -> None:
    killed = importlib.import_module("killed_run")
    process = processes.Process(target=killed.train, args=(tiny_directory, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    config = configuration(tiny_directory, tmp_path)(checkpoint_every=3, resume=True)
    assert sorted(path.name for path in config.checkpoints.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    assert newest_checkpoint(config.checkpoints) == config.checkpoints / "checkpoint-3"
    assert_same_run(run(config), unbroken)


def test_the_checkpoint_before_goes_when_the_next_is_on_the_disk(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(max_steps=4, checkpoint_every=2)
    seen: list[tuple[str, str]] = []
    synced, removed = os.fsync, shutil.rmtree

    def fsync(descriptor: int) -> None:
        seen.append(("synced", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        synced(descriptor)

    def rmtree(path: Any, **settings: Any) -> None:
        seen.append(("removed", Path(path).name))
        removed(path, **settings)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("shutil.rmtree", rmtree)
    run(config)
    at = seen.index(("removed", "checkpoint-2"))
    files = {*PARTS, "checkpoint-4", "checkpoints"}
    assert {name for what, name in seen[at - len(files) : at] if what == "synced"} == files


@pytest.mark.parametrize("size", [10_000, 40_000])  # of the delta file, of the moments
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(
    configure: Configure, unbroken: Result, size: int
) -> None:
    config = configure(checkpoint_every=4)
    with room_again(), pytest.raises(CheckpointError) as error:
        run(config, Limit(8, size))
    said = str(error.value)
    assert said.startswith(
        f"update 8: expected to write a checkpoint to {config.checkpoints}, got: "
    )
    assert re.search(r"\d+ MB free on the disk; the one before it is left as it was$", said)
    assert "\n" not in said
    assert [path.name for path in config.checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    assert_same_run(run(configure(resume=True, checkpoint_every=4)), unbroken)


def test_a_disk_full_at_the_last_moment_leaves_the_last_checkpoint(
    configure: Configure, unbroken: Result
) -> None:
    finished = Trainer(configure())
    finished.train()
    with (
        room_again(),
        pytest.raises(CheckpointError, match=r"expected to write .*, got: .*File too"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        finished.save()
    assert not finished.config.out.exists()
    assert_same_run(run(configure(resume=True)), unbroken)


def test_a_disk_too_full_for_the_report_leaves_the_last_checkpoint(
    configure: Configure, unbroken: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = Trainer(configure())
    finished.train()
    monkeypatch.undo()  # this one is to write its report
    with (
        room_again(),
        pytest.raises(CheckpointError, match="and its report, got: "),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        finished.save()
    assert_same_run(run(configure(resume=True)), unbroken)


def test_a_disk_too_full_for_the_best_deltas_ends_the_run_in_one_line(
    configure: Configure,
) -> None:
    config = configure(eval_data=configure().data, eval_every=3, checkpoint_every=2)
    with room_again(), pytest.raises(CheckpointError, match=r"update 3: .*best\.safetensors"):
        run(config, Limit(3, 10_000))
    assert newest_checkpoint(config.checkpoints) == config.checkpoints / "checkpoint-2"


@pytest.mark.parametrize("left", [None, 0.5])
def test_best_deltas_that_are_gone_are_not_passed_over_in_silence(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, left: float | None
) -> None:
    evaluated_as(monkeypatch, 3.0, 1.0, 2.0)  # before the first update, after 5 and 10
    config = configure(eval_data=configure().data, eval_every=5)
    finished = Trainer(config)
    finished.train()
    cut_short(config.best, left)
    with pytest.raises(CheckpointError) as error:
        finished.save()
    said = str(error.value)
    assert said.startswith(f"{config.best}: expected the deltas of update 5, whose held-out loss ")
    assert "\n" not in said
    assert not config.out.exists()


@pytest.mark.parametrize("left", ["none", "another"])
def test_a_resumed_run_has_the_best_deltas_of_its_checkpoint(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: str
) -> None:
    losses = 3.0, 1.0, 2.0, 2.5, 2.6, 2.7  # before the first update, after every second
    settings: dict[str, Any] = {"eval_data": configure().data, "eval_every": 2}
    evaluated_as(monkeypatch, *losses)
    whole = run(configure(**settings, out=tmp_path / "whole.safetensors"))
    evaluated_as(monkeypatch, *losses[:3])
    config = configure(**settings)
    interrupt(config, update=5)
    if left == "none":
        config.best.unlink()
    else:  # of an update after the checkpoint, which now comes out otherwise
        other = read_delta(config.best.read_bytes())
        for delta in other.modules.values():
            delta.values.mul_(2.0)
        write_delta(config.best, other)
    evaluated_as(monkeypatch, *losses[3:])
    assert_same_run(whole, run(replace(config, resume=True)))


def test_best_deltas_that_are_the_last_need_no_file(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated_as(monkeypatch, 3.0, 2.0)
    config = configure(eval_data=configure().data)
    finished = Trainer(config)
    finished.train()
    config.best.unlink()
    finished.save()
    assert config.out.exists()


def test_a_place_without_room_for_tensorboard_is_refused_before_training(
    configure: Configure,
) -> None:
    config = configure()
    config.folder.mkdir(parents=True)
    (config.folder / "tensorboard").touch()
    with pytest.raises(ConfigError, match=r"^out: expected to write to .*/tensorboard, got: "):
        Trainer(config)
    (config.folder / "tensorboard").unlink()
    with room_again(), pytest.raises(ConfigError, match=r"^out: .* got: .*File too large"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        Trainer(config)


def test_a_run_goes_on_when_tensorboards_file_can_no_longer_be_written(
    configure: Configure, unbroken: Result, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure()
    result = run(config, Barred(3, config.folder / "tensorboard"))
    assert_same_run(result, unbroken)
    said = capfd.readouterr().err
    assert said.count("TensorBoard will not show the rest of this run: [Errno ") == 1
    assert "Traceback" not in said


def test_a_loss_that_is_not_finite_stops_the_run_at_its_last_good_checkpoint(
    configure: Configure, unbroken: Result
) -> None:
    config = configure(checkpoint_every=2)
    with pytest.raises(NonFiniteLoss, match=r"^update 6: expected a finite loss, got nan; try a"):
        run(config, Spoil(5, lambda values: values.data))
    assert newest_checkpoint(config.checkpoints) == config.checkpoints / "checkpoint-4"
    assert_same_run(run(configure(checkpoint_every=2, resume=True)), unbroken)


@pytest.mark.parametrize("update", [6, 10])
def test_values_that_are_not_finite_are_never_written(
    configure: Configure, unbroken: Result, update: int
) -> None:
    config = configure(checkpoint_every=2)
    with pytest.raises(NonFiniteLoss, match=rf"^update {update}: expected finite values"):
        run(config, Spoil(update, lambda values: values.grad))
    assert not config.out.exists()
    assert newest_checkpoint(config.checkpoints) == config.checkpoints / f"checkpoint-{update - 2}"
    assert_same_run(run(configure(checkpoint_every=2, resume=True)), unbroken)


def test_a_held_out_loss_that_is_not_finite_stops_the_run(
    configure: Configure, tmp_path: Path
) -> None:
    held_out = write_lines(tmp_path / "held-out.jsonl", [TOGETHER])
    config = configure(eval_data=held_out, eval_every=3, checkpoint_every=2)
    with pytest.raises(NonFiniteLoss, match=r"^update 3: expected a finite held-out loss, got nan"):
        run(config, Spoil(3, lambda values: values.grad))
    assert newest_checkpoint(config.checkpoints) == config.checkpoints / "checkpoint-2"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([TOGETHER, {"prompt": "a", "answer": "b"}], ":2: expected `prompt` and `completion`"),
        (
            [TOGETHER, TOGETHER, {"prompt": "a", "completion": ""}],
            ":3: expected `completion` to be",
        ),
        (
            [TOGETHER, {"prompt": "a" * 90, "completion": "b"}],
            ":2: expected at most 64 tokens, got",
        ),
        ([], ": expected at least one example, got none"),
    ],
)
@pytest.mark.parametrize("field", ["data", "eval_data", "fisher_data"])
@pytest.mark.usefixtures("not_loaded")
def test_data_that_cannot_be_used_is_refused_before_the_base_is_loaded(
    configure: Configure, tmp_path: Path, lines: list[Any], said: str, field: str
) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", lines)
    with pytest.raises(DataError) as error:
        Trainer(configure(max_length=64, method="fisher", **{field: bad}))
    assert str(error.value).startswith(f"{bad}{said}")
    assert "\n" not in str(error.value)


@pytest.fixture
def small_base(tiny_directory: Path, tmp_path: Path) -> str:
    """The tiny model with 16 positions, and a token that it has no embedding for."""
    base = tmp_path / "small"
    shutil.copytree(tiny_directory, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.pad_token = "<|new|>"
    tokenizer.save_pretrained(base)
    return str(base)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a" * 15, "expected at most 16 tokens, as many as the base has positions, got 17"),
        ("<|new|>", "expected tokens that the base has an embedding for, ids below 260, got 260"),
    ],
)
@pytest.mark.usefixtures("not_loaded")
def test_an_example_that_the_base_cannot_take_is_refused_before_it_is_loaded(
    configure: Configure, small_base: str, tmp_path: Path, prompt: str, said: str
) -> None:
    lines = [TOGETHER, {"prompt": prompt, "completion": "b"}]
    data = write_lines(tmp_path / "long.jsonl", lines)
    with pytest.raises(DataError) as error:
        Trainer(configure(base=small_base, data=data))
    assert str(error.value) == f"{data}:2: {said}"


def test_examples_are_cut_to_the_bases_positions(
    configure: Configure, small_base: str, tmp_path: Path
) -> None:
    lines = [TOGETHER, {"prompt": "a" * 10, "completion": "b" * 10}]
    data = write_lines(tmp_path / "long.jsonl", lines)
    trainer = Trainer(configure(base=small_base, data=data, too_long="truncate", packing=True))
    assert (trainer.examples.limit, trainer.examples.truncated) == (16, 1)
    assert len(trainer.train().losses) == 10


def test_padding_is_a_token_that_the_base_knows(configure: Configure, small_base: str) -> None:
    assert len(run(configure(base=small_base, max_steps=1)).losses) == 1


@pytest.mark.usefixtures("not_loaded")
def test_a_broken_tokenizer_is_refused_before_the_base_is_loaded(
    configure: Configure, tiny_directory: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_directory, base)
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseError, match=rf"^expected a tokenizer at {base}, got: "):
        Trainer(configure(base=str(base)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.usefixtures("not_loaded")
def test_cuda_without_a_device_is_refused_before_the_base_is_loaded(configure: Configure) -> None:
    with pytest.raises(BaseError, match=r"^device: expected a CUDA device .*, got none$"):
        Trainer(configure(device="cuda"))


@pytest.mark.usefixtures("not_loaded")
def test_modules_that_match_nothing_are_refused_before_the_base_is_loaded(
    configure: Configure,
) -> None:
    with pytest.raises(
        ConfigError, match=r"^modules: expected ends of .* as q_proj.*, got 'w_proj'$"
    ):
        Trainer(configure(modules=("q_proj", "w_proj")))


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    "out",
    [
        "data.jsonl/sums.safetensors",
        "data.jsonl/deeper/sums.safetensors",
        "a.safetensors",  # a directory
        "taken.safetensors",  # its checkpoints are a file
        "a" * 243 + ".safetensors",  # as long as a name may be, but to be written under a longer
        "a" * 244 + ".safetensors",
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_base_is_loaded(
    configure: Configure, tmp_path: Path, out: str
) -> None:
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "taken.run").mkdir()
    (tmp_path / "taken.run" / "checkpoints").touch()
    with pytest.raises(ConfigError, match=r"^out: expected .*, got") as error:
        Trainer(configure(out=tmp_path / out))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"density": 0.01}, "density: expected 0.05 as in the run to resume, got 0.01"),
        ({"method": "random"}, "method: expected spiel-ag as in the run to resume, got random"),
        ({"max_steps": 20}, "max_steps: expected 10 as in the run to resume, got 20"),
        ({"seed": 1}, "seed: expected 0 as in the run to resume, got 1"),
    ],
)
def test_another_setting_than_the_run_began_with_is_refused_before_the_base_is_loaded(
    configure: Configure, two_checkpoints: Path, changes: dict[str, Any], said: str
) -> None:
    config = configure(resume=True, **changes)
    shutil.copytree(two_checkpoints, config.checkpoints)
    with pytest.raises(ConfigError) as error:
        Trainer(config)
    assert str(error.value) == said


@pytest.mark.usefixtures("not_loaded")
def test_a_base_configured_otherwise_is_not_gone_on_with(
    configure: Configure, two_checkpoints: Path, tiny_directory: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_directory, tmp_path / "other")
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-2}))
    config = configure(resume=True, base=str(base))
    shutil.copytree(two_checkpoints, config.checkpoints)
    with pytest.raises(ConfigError, match=r"^config.json: expected \w{12} as in the run to resume"):
        Trainer(config)


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize("field", ["data", "over", "eval_data"])
def test_what_a_run_would_clear_is_not_read(configure: Configure, field: str) -> None:
    config = configure()
    config.checkpoints.mkdir(parents=True)
    path = shutil.copy(config.data, config.checkpoints / "mine.jsonl")
    with pytest.raises(ConfigError, match=f"^{field}: expected a place outside .*, got .*mine"):
        Trainer(configure(**{field: Path(path)}))
    assert Path(path).exists()


@pytest.mark.usefixtures("not_loaded")
def test_a_run_that_another_process_makes_is_left_alone(configure: Configure) -> None:
    config = configure()
    config.checkpoints.mkdir(parents=True)
    hold = "import fcntl; file = open({!r}, 'wb'); fcntl.lockf(file, fcntl.LOCK_EX)"
    hold = f"{hold.format(str(config.checkpoints / 'lock'))}; print(); input()"
    command = [sys.executable, "-uc", hold]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(ConfigError, match=r"^out: expected a file that no other run is to"):
            Trainer(config)


def test_a_base_with_several_chat_templates_trains_on_pairs(
    configure: Configure, tiny_directory: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_directory, tmp_path / "several")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(base)
    assert isinstance(AutoTokenizer.from_pretrained(base).chat_template, dict)
    assert len(run(configure(base=str(base), max_steps=1)).losses) == 1


@pytest.mark.parametrize(("field", "count"), [("data", 10), ("eval_data", 0)])
def test_other_data_than_the_run_began_with_is_refused(
    configure: Configure, two_checkpoints: Path, tmp_path: Path, field: str, count: int
) -> None:
    other = write_lines(tmp_path / "other.jsonl", [TOGETHER] * 10)
    config = configure(resume=True, **{field: other})
    shutil.copytree(two_checkpoints, config.checkpoints)
    said = (
        rf"^{field}: expected {count} examples \(.{{12}}\) as in the run to resume, got 10 examples"
    )
    with pytest.raises(ConfigError, match=said):
        Trainer(config)


def test_the_command_says_how_many_examples_were_too_long(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [{"prompt": "a" * 20, "completion": "b" * 20}, {"prompt": "a" * 50, "completion": "b"}]
    data = write_lines(tmp_path / "long.jsonl", [TOGETHER, long[0], long[0], long[1]])
    held_out = write_lines(tmp_path / "held-out.jsonl", [TOGETHER, long[0]])
    config = configure(data=data, eval_data=held_out)
    command_line.train(
        f"--base {config.base} --data {data} --eval-data {held_out} --out {config.out} "
        "--max-length 32 --too-long truncate --max-steps 2 --method random".split()
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{data}: of 4 examples 2 were cut to 32 tokens, 1 left out"
    assert lines[1] == f"{held_out}: of 2 examples 1 were cut to 32 tokens, 0 left out"
    assert lines[2].startswith(f"{config.out}: ")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("density", "0"),
        ("density", "1.01"),
        ("epochs", "inf"),
        ("rank", "0"),
        ("epsilon", "1.5"),
        ("clip", "1e+31"),
        ("weight_decay", "10000000.0"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name(
    configure: Configure, option: str, value: str
) -> None:
    config = configure()
    flag = option.replace("_", "-")
    words = f"--base {config.base} --data {config.data} --out {config.out} --{flag} {value}"
    with pytest.raises(SpieldoseError, match=rf"^{option} must be .*, got {re.escape(value)}"):
        command_line.train(words.split())


@pytest.mark.parametrize("field", ["base", "data", "over", "eval_data", "chat_template"])
@pytest.mark.usefixtures("not_loaded")
def test_what_a_run_reads_is_not_written_over(
    configure: Configure, tiny_directory: Path, tmp_path: Path, field: str
) -> None:
    read = tmp_path / "read.safetensors"
    read.write_text("what is there")
    taken: Any = read
    if field == "base":
        taken = shutil.copytree(tiny_directory, tmp_path / "base")
        read = taken / "model.safetensors"
    before = read.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(read)
    for out in (read, tmp_path / "link.safetensors"):
        for refuse in (Trainer, make_plan):
            with pytest.raises(ConfigError, match=f"^out: expected another file than .* {field}"):
                refuse(configure(**{field: taken}, out=out))
    assert read.read_bytes() == before


def cut_short(path: Path, left: float | None) -> None:
    """Leave a share of a file; None: not even its name."""
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
