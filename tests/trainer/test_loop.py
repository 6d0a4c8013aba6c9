"""What the loop promises: schedules, clipping, checkpointing, held-out examples, exact resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from spieldose_kernels.base import Base, load_base
from spieldose_trainer import memory
from spieldose_trainer.errors import Interrupted
from spieldose_trainer.methods import METHODS, MethodName
from spieldose_trainer.support import flat_positions
from spieldose_trainer.trainer import Trainer

from .configuration import Configure
from .runs import (
    Interrupt,
    adapter_of,
    assert_same_deltas,
    assert_same_run,
    interrupt,
    run,
    write_lines,
)

pytestmark = pytest.mark.usefixtures("no_report")

HELD_OUT = [{"prompt": f"{a}+", "completion": f"is {a * 3}"} for a in (11, 12, 20)]
# how runs may differ in what a checkpoint must hold, beside their method
KINDS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulation": 2, "batch_size": 2},
    "cesgc": {"method": "sgc", "sgc_variant": "cesgc"},
    "clip": {"clip": 0.1, "schedule": "cosine", "weight_decay": 1.0},
    "drop": {"drop": "least-changed"},
    "evaluation": {"eval_every": 2, "patience": 3, "exact_match": True},
    "packing": {"packing": True, "max_length": 40, "batch_size": 2},
    "residual": {"start": "residual", "method": "magnitude"},
}
SMALL: dict[str, Any] = {"max_steps": 7, "reselect_every": 3, "rank": 8, "fisher_samples": 4}


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """A file of examples that are not trained on."""
    return write_lines(tmp_path / "held-out.jsonl", HELD_OUT)


class Norms(TrainerCallback):
    """Note the norm of the whole gradient before every update."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0, 1 / 3, 2 / 3, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("cosine", [0, 1 / 3, 2 / 3, 1, 0.9505, 0.8117, 0.6113, 0.3887, 0.1883, 0.0495]),
    ],
)
def test_the_learning_rate_rises_to_what_was_asked_for_and_falls_as_asked_for(
    configure: Configure, schedule: str, expected: list[float]
) -> None:
    log = run(configure(method="random", schedule=schedule, warmup=0.3, learning_rate=1e-2)).log
    rates = [update.learning_rate / 1e-2 for update in log.updates]
    assert rates == pytest.approx(expected, abs=1e-4)


def test_clipping_limits_the_norm_of_the_values_gradient(configure: Configure) -> None:
    free, clipped = Norms(), Norms()
    run(configure(max_steps=6), free)
    run(configure(max_steps=6, clip=0.05), clipped)
    assert min(free.norms) > 0.06
    assert clipped.norms == pytest.approx([0.05] * 6, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_newcomers_moments_are_of_clipped_gradients_as_the_survivors_are(
    configure: Configure, accumulation: int
) -> None:
    settings = {"accumulation": accumulation, "max_steps": 2, "selection_steps": 1}
    norms, free, clipped = Norms(), Moments(1), Moments(1)
    run(configure(**settings), norms, free)
    run(configure(**settings, clip=0.05), clipped)
    factor = 0.05 / norms.norms[0]
    assert factor < 1
    for name, moments in free.found.items():
        for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            torch.testing.assert_close(
                clipped.found[name][moment], moments[moment] * factor**power, rtol=1e-3, atol=0
            )


class Moments(TrainerCallback):
    """Keep Adam's moments as they are after one update."""

    def __init__(self, update: int) -> None:
        self.update = update
        self.found: dict[str, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            moments = kwargs["optimizer"].optimizer.moments
            for name, layer in kwargs["model"].layers.items():
                self.found[name] = {k: v.clone() for k, v in moments(layer.values).items()}


@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma"])
def test_recomputed_activations_change_nothing(configure: Configure, method: MethodName) -> None:
    kept, recomputed = (
        Trainer(configure(method=method, max_steps=6, gradient_checkpointing=on))
        for on in (False, True)
    )
    passes: dict[bool, int] = {}
    for trainer in (kept, recomputed):
        first = trainer.base.model.model.layers[0].mlp.act_fn  # called in every forward pass
        with counted(first) as calls:
            trainer.train()
        passes[trainer is recomputed] = len(calls)
    assert passes == {False: 6, True: 12}
    assert (
        kept._loop.recorder.log.updates[-1].loss == recomputed._loop.recorder.log.updates[-1].loss
    )
    assert_same_values(kept, recomputed)


def test_packed_examples_train(configure: Configure) -> None:
    config = configure(packing=True, max_length=40, batch_size=1, max_steps=None, epochs=6.0)
    losses = run(config).losses
    assert len(losses) == 6 * 2  # 10 examples of at most 8 tokens are 2 rows of 40
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("packing", [False, True])
def test_padding_is_not_counted_among_the_tokens(configure: Configure, packing: bool) -> None:
    trainer = Trainer(
        configure(packing=packing, max_length=40, batch_size=10, max_steps=1, method="random")
    )
    (update,) = trainer.train().log.updates  # the whole data
    assert update.tokens == sum(len(example.tokens) for example in trainer.examples)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 7, "eval_every": 3}, [0, 3, 6, 7]),
        ({"max_steps": 6, "eval_every": 3}, [0, 3, 6]),
        ({"max_steps": None, "epochs": 2.0, "eval_every": 3}, [0, 3, 6]),  # 3 is an epoch's end
        ({"max_steps": 2, "eval_every": 100}, [0, 2]),
    ],
)
def test_held_out_examples_are_looked_at_first_last_and_every_so_often(
    configure: Configure, held_out: Path, changes: dict[str, Any], expected: list[int]
) -> None:
    log = run(configure(eval_data=held_out, **changes)).log
    assert [evaluation.update for evaluation in log.evaluations] == expected
    assert all(evaluation.exact_match is None for evaluation in log.evaluations)


def test_the_first_look_is_at_the_base(configure: Configure, held_out: Path) -> None:
    config = configure(method="random", max_steps=1, learning_rate=1e-2, eval_data=held_out)
    first = run(config).log.evaluations[0]
    trainer = Trainer(configure(method="zo", eval_data=held_out))
    assert trainer._loop.evaluate()["eval_loss"] == first.loss


def test_exact_matches_are_recorded(configure: Configure, tmp_path: Path) -> None:
    learnt = write_lines(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}])
    # cut before its end, which the tiny model cannot learn to say: its embedding is 0
    config = configure(
        data=learnt, eval_data=learnt, max_length=2, too_long="truncate", exact_match=True
    )
    evaluations = run(config).log.evaluations
    assert [evaluation.exact_match for evaluation in evaluations] == [0.0, 1.0]


def test_looking_at_held_out_examples_changes_nothing(configure: Configure, held_out: Path) -> None:
    without, with_looks = (
        Trainer(configure(eval_data=data, eval_every=2, exact_match=data is not None))
        for data in (None, held_out)
    )
    first, second = without.train(), with_looks.train()
    assert first.losses == second.losses
    assert_same_values(without, with_looks)


def test_the_file_holds_the_deltas_that_were_best(configure: Configure, held_out: Path) -> None:
    config = configure(eval_data=held_out, eval_every=3, learning_rate=0.1, max_steps=9)
    best = Best(6)
    result = run(config, best)
    losses = [evaluation.loss for evaluation in result.log.evaluations]
    assert min(losses) == losses[2] < losses[3]  # or the test shows nothing
    for name, delta in adapter_of(result).modules.items():
        assert torch.equal(delta.values, best.values[name])
        assert torch.equal(result.model.layers[name].values.detach(), best.values[name])


class Best(TrainerCallback):
    """Keep the values as they are after one update."""

    def __init__(self, update: int) -> None:
        self.update = update
        self.values: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.update:
            layers = kwargs["model"].layers
            self.values = {name: layer.values.detach().clone() for name, layer in layers.items()}


def test_patience_ends_a_run_that_gets_no_better(configure: Configure, held_out: Path) -> None:
    config = configure(
        eval_data=held_out, eval_every=1, learning_rate=0.1, patience=2, max_steps=30
    )
    result = run(config)
    losses = [evaluation.loss for evaluation in result.log.evaluations]
    assert len(result.losses) == len(losses) - 1 < 30
    assert losses.index(min(losses)) == len(losses) - 3
    assert result.file.exists()


def test_a_run_out_of_patience_does_not_go_on_when_it_is_resumed(
    configure: Configure, held_out: Path
) -> None:
    config = {
        "eval_data": held_out,
        "eval_every": 1,
        "learning_rate": 0.1,
        "patience": 2,
        "max_steps": 30,
    }
    stopped = Trainer(configure(**config))  # and never saved
    updates = len(stopped.train().losses)
    assert updates < 30
    expected = stopped.adapter()
    resumed = run(configure(**config, resume=True))
    assert len(resumed.losses) == updates
    assert_same_deltas(adapter_of(resumed), expected)


def test_what_an_earlier_run_left_is_not_taken_for_the_best(
    configure: Configure, held_out: Path
) -> None:
    Trainer(configure(eval_data=held_out, max_steps=2))._loop.evaluate()  # and cut short
    config = configure(max_steps=2)
    assert config.best.exists()
    result = run(config)
    assert all(bool(delta.values.any()) for delta in adapter_of(result).modules.values())


@pytest.mark.parametrize("kind", [*METHODS, *KINDS])
def test_a_resumed_run_is_the_unbroken_one(configure: Configure, held_out: Path, kind: Any) -> None:
    changes = SMALL | KINDS.get(kind, {"method": kind})
    if kind == "evaluation":
        changes |= {"eval_data": held_out}
    config = configure(**changes)
    unbroken = run(config)
    assert len(unbroken.losses) == config.max_steps
    unbroken = replace(unbroken, file=unbroken.file.rename(config.folder / "unbroken"))
    interrupt(config, update=4)  # the first of a phase
    assert_same_run(run(configure(**changes, resume=True)), unbroken)


def test_random_numbers_go_on_where_they_stood(configure: Configure, tiny_directory: Path) -> None:
    """Dropout draws from the generators that a checkpoint holds."""
    unbroken = run(configure(), base=forgetful(tiny_directory))
    assert unbroken.losses != run(configure()).losses
    interrupt(configure(), update=5, base=forgetful(tiny_directory))
    resumed = run(configure(resume=True), base=forgetful(tiny_directory))
    assert resumed.losses == unbroken.losses


def test_what_others_draw_before_a_run_changes_nothing(
    configure: Configure, tiny_directory: Path
) -> None:
    """The order of examples and dropout are the run's own."""
    losses = []
    for seed in (1, 2):
        trainer = Trainer(configure(), base=forgetful(tiny_directory))
        torch.manual_seed(seed)
        losses.append(trainer.train().losses)
        trainer.save()
    interrupt(configure(), update=3, base=forgetful(tiny_directory))
    trainer = Trainer(configure(resume=True), base=forgetful(tiny_directory))
    torch.manual_seed(3)
    assert losses[0] == losses[1] == trainer.train().losses


def test_a_template_that_tells_the_time_does_not_keep_a_run_from_going_on(
    configure: Configure, tmp_path: Path
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%f') }}{% for m in messages %}|{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}|{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 5)
    changes = {"data": data, "chat_template": template}
    interrupt(configure(**changes), update=3)
    assert len(run(configure(**changes, resume=True)).losses) == 10


def test_the_peak_of_what_was_resumed_counts(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Grow(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            monkeypatch.setattr(memory, "peak_resident", lambda: state.global_step << 40)

    with pytest.raises(Interrupted):
        run(configure(), Grow(), Interrupt(8))
    monkeypatch.setattr(memory, "peak_resident", lambda: 5 << 40)
    trainer = Trainer(configure(resume=True))
    trainer.train()
    trainer.save()
    assert trainer.memory is not None and trainer.memory.peak == 8 << 40


def test_a_resumed_run_may_write_checkpoints_more_often(configure: Configure) -> None:
    interrupt(configure(checkpoint_every=100), update=2)
    config = configure(resume=True, checkpoint_every=3, max_steps=10)
    run_until_checkpoints = Steps()
    run(config, run_until_checkpoints)
    assert run_until_checkpoints.saved == [3, 6, 9, 10]


class Steps(TrainerCallback):
    """Note the updates after which a checkpoint was written."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved.append(state.global_step)


def forgetful(directory: Path) -> Base:
    """Load the tiny model with dropout."""
    base = load_base(
        str(directory), device=torch.device("cpu"), compute_dtype=torch.float32, fused=False
    )
    for layer in base.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return base


class counted:
    """Count a module's calls while the block runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls: list[None] = []
        self.handle = module.register_forward_hook(lambda *_: self.calls.append(None))

    def __enter__(self) -> list[None]:
        return self.calls

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def assert_same_values(a: Trainer, b: Trainer) -> None:
    for name, layer in a.model.layers.items():
        other = b.model.layers[name]
        assert torch.equal(flat_positions(layer), flat_positions(other))
        assert torch.equal(layer.values, other.values)
