"""The faults of the SpIEL authors' implementation, each shown to be absent here.

Numbered as in PAPERS, section 1. Fault 8 belongs to SpIEL-MA.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spieldose_kernels.base import Base, dense_weight, load_base
from spieldose_kernels.delta_file import read_delta, write_delta
from spieldose_kernels.linear import DeltaLinear
from spieldose_trainer.model import SparseModel
from spieldose_trainer.selectors.candidates import Candidates
from spieldose_trainer.support import flat_positions
from spieldose_trainer.updaters.adamw import SparseAdamW

SHAPE = (5, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fault_1_ages_advance_per_value_whatever_the_values_dtype(dtype: torch.dtype) -> None:
    values = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    updater = SparseAdamW([values], lr=0.1)
    where = torch.tensor([False, True, False])
    updater.seed(values, where, mean=torch.ones(1), mean_square=torch.ones(1), age=300)
    for _ in range(2):
        values.grad = torch.ones_like(values)
        updater.step()
    assert updater.moments(values)["age"].tolist() == [2.0, 302.0, 2.0]
    assert {moment.dtype for moment in updater.moments(values).values()} == {torch.float32}


def test_fault_2_candidates_count_past_256_samples_under_bfloat16_activations(
    make_trainable: Callable[..., Any],
) -> None:
    layer = make_trainable(torch.tensor([0]), shape=SHAPE)
    candidates = Candidates(SHAPE, count=4)
    layer.probe = candidates.observe
    x = torch.ones(1, SHAPE[1], dtype=torch.bfloat16)
    for _ in range(300):
        layer.add_to(torch.zeros(1, SHAPE[0], dtype=torch.bfloat16), x).sum().backward()
        candidates.finish_update()
    assert candidates.samples == 300
    assert candidates.total.tolist() == [300.0] * 4
    assert candidates.total_square.tolist() == [300.0] * 4
    assert candidates.total.dtype == candidates.total_square.dtype == torch.float32


@pytest.mark.parametrize("accumulation", [2, 3])
def test_fault_3_seeds_do_not_depend_on_gradient_accumulation(
    make_toy: Callable[..., Any], accumulation: int
) -> None:
    # density 0.5: all weights are candidates; γ = 1: the seeds are this update's gradients
    whole = make_toy(density=0.5, steps=1)
    parts = make_toy(density=0.5, steps=1, accumulation=accumulation)
    assert whole.update(1) == parts.update(1) > 0
    for name in whole.layers:
        for moment in ("exp_avg", "exp_avg_sq", "age"):
            torch.testing.assert_close(parts.moment(name, moment), whole.moment(name, moment))


def test_fault_4_a_seeded_value_moves_as_if_adam_had_seen_its_samples() -> None:
    mean, mean_square, age, gradient = 0.3, 0.25, 5, -0.7
    values = torch.nn.Parameter(torch.zeros(2))
    updater = SparseAdamW([values], lr=0.01)
    where = torch.tensor([False, True])
    seeds = {"mean": torch.tensor([mean]), "mean_square": torch.tensor([mean_square])}
    updater.seed(values, where, age=age, **seeds)
    values.grad = torch.full((2,), gradient)
    updater.step()
    first, second = [mean] * age + [gradient], [mean_square] * age + [gradient**2]
    expected = -0.01 * unbiased(first, beta=0.9) / (unbiased(second, beta=0.999) ** 0.5 + 1e-6)
    assert float(values[1].detach()) == pytest.approx(expected, rel=1e-4)
    assert updater.moments(values)["age"].tolist() == [1.0, age + 1.0]


def test_fault_4_moments_after_a_reselection_are_unbiased_means_of_the_phase(
    make_toy: Callable[..., Any],
) -> None:
    toy = make_toy(density=0.5)
    for update in range(1, 5):
        toy.update(update)
    watched = dict(toy.selector.candidates)
    before = {name: toy.positions(name) for name in toy.layers}
    toy.update(5)
    for name, watcher in watched.items():
        fresh = ~torch.isin(watcher.positions, before[name])
        grown = fresh & torch.isin(watcher.positions, toy.positions(name))
        assert bool(grown.any())
        where = watcher.positions[grown]
        mean = toy.moment(name, "exp_avg").flatten()[where] / (1 - 0.9**5)
        square = toy.moment(name, "exp_avg_sq").flatten()[where] / (1 - 0.999**5)
        torch.testing.assert_close(mean, watcher.total[grown] / 5)
        torch.testing.assert_close(square, watcher.total_square[grown] / 5)
        assert toy.moment(name, "age").flatten()[where].unique().tolist() == [5.0]


def test_fault_5_every_phase_watches_exactly_as_many_updates_as_asked(
    make_toy: Callable[..., Any],
) -> None:
    toy = make_toy()
    watched, replaced = [], []
    for update in range(1, 61):
        toy.selector.begin_update(update)
        watched += [update] * any(layer.probe is not None for layer in toy.layers.values())
        replaced += [update] * (toy.update(update) > 0)
    assert watched == [*range(1, 6), *range(21, 26), *range(41, 46)]
    assert replaced == [5, 25, 45]


def test_fault_6_candidates_come_from_every_pass_of_the_first_update() -> None:
    candidates = Candidates(SHAPE, count=2)
    candidates.observe(*outer(position=7, size=1.0))
    candidates.observe(*outer(position=11, size=5.0))
    candidates.observe(*outer(position=23, size=-3.0))
    candidates.finish_update()
    assert candidates.positions.tolist() == [11, 23]
    assert candidates.total.tolist() == [5.0, -3.0]


def test_fault_6_passes_that_cancel_do_not_make_a_candidate() -> None:
    candidates = Candidates(SHAPE, count=2)
    candidates.observe(*outer(position=7, size=9.0))
    candidates.observe(*outer(position=7, size=-9.0))
    candidates.observe(*outer(position=11, size=1.0))
    candidates.observe(*outer(position=12, size=1.0))
    candidates.finish_update()
    assert candidates.positions.tolist() == [11, 12]


def test_fault_6_there_are_more_candidates_than_places_in_the_support(
    make_toy: Callable[..., Any],
) -> None:
    toy = make_toy()
    toy.update(1)
    for name, watcher in toy.selector.candidates.items():
        assert watcher.positions.numel() > toy.positions(name).numel()


def test_fault_6_later_updates_of_the_phase_decide_the_first_support_too(
    make_toy: Callable[..., Any],
) -> None:
    toy = make_toy()
    toy.update(1)
    first = {name: watcher.total.clone() for name, watcher in toy.selector.candidates.items()}
    watched = dict(toy.selector.candidates)
    for update in range(2, 6):
        toy.update(update)
    for name, watcher in watched.items():
        size = toy.positions(name).numel()
        early = watcher.positions[first[name].abs().topk(size).indices].sort().values
        assert not torch.equal(toy.positions(name), early)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_fault_7_the_first_reselection_leaves_nothing_of_the_random_support(
    make_toy: Callable[..., Any], decay: str
) -> None:
    toy = make_toy(decay=decay)
    for update in range(1, 5):
        toy.update(update)
    watched = dict(toy.selector.candidates)
    assert toy.update(5) > 0
    for name, watcher in watched.items():
        size = toy.positions(name).numel()
        best = watcher.positions[watcher.total.abs().topk(size).indices].sort().values
        assert torch.equal(toy.positions(name), best)


def test_fault_9_a_delta_far_below_a_weights_rounding_still_counts(
    tiny_directory: Path, make_model: Callable[..., SparseModel]
) -> None:
    base = load_base(
        str(tiny_directory),
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
        fused=False,
    )
    name, (_, width) = next(iter(base.spec.shapes.items()))
    model = make_model(base, density=0.1)
    linear, delta = base.model.get_submodule(name), model.layers[name]
    assert isinstance(linear, DeltaLinear)
    position = flat_positions(delta)[0]
    row, column = divmod(int(position), width)
    weights = dense_weight(linear.base, torch.float32)[row]
    twin = next(int(c) for c in (weights == weights[column]).nonzero() if c != column)
    x = torch.zeros(1, width, dtype=torch.bfloat16)
    x[0, column], x[0, twin] = 1.0, -1.0  # the row's equal weights cancel: only the delta is left
    assert float(linear(x)[0, row].detach()) == 0.0
    tiny = 1e-6 * float(weights[column])
    delta.values.data[0] = tiny
    assert float(linear(x)[0, row].detach()) == pytest.approx(tiny, rel=1e-2)


def test_fault_10_ranks_with_different_data_agree_on_candidates_and_mean_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # where the ranks find their module too
    ranks = importlib.import_module("two_ranks")
    torch.multiprocessing.spawn(ranks.accumulate, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    means = [(ranks.gradient(0, update) + ranks.gradient(1, update)) / 2 for update in range(2)]
    expected = means[0].abs().topk(ranks.COUNT).indices.sort().values
    assert torch.equal(first["positions"], expected)
    torch.testing.assert_close(first["total"], (means[0] + means[1])[expected])
    square = means[0].square() + means[1].square()
    torch.testing.assert_close(first["total_square"], square[expected])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("density", [0.003, 0.02, 0.3])
def test_fault_11_density_is_of_the_target_layers_alone(
    tiny_base: Base, make_model: Callable[..., SparseModel], density: float
) -> None:
    model = make_model(tiny_base, density=density)
    for name, (height, width) in tiny_base.spec.shapes.items():
        assert model.layers[name].values.numel() == int(density * height * width)
    weights = sum(height * width for height, width in tiny_base.spec.shapes.values())
    assert density - len(model.layers) / weights < model.density <= density


@pytest.mark.parametrize("accumulation", [1, 3])
def test_fault_12_a_dense_gradient_exists_in_a_phases_first_update_only(
    make_toy: Callable[..., Any], accumulation: int
) -> None:
    toy = make_toy(accumulation=accumulation)
    built = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default and out.shape in toy.shapes.values():
                built.append(running)
            return out

    for running in range(1, 61):
        with Watch():
            toy.update(running)
    passes = accumulation * len(toy.layers)
    assert built == [1] * passes + [21] * passes + [41] * passes


def test_fault_12_layers_are_watched_inside_phases_only(make_toy: Callable[..., Any]) -> None:
    toy = make_toy()
    for update in range(1, 41):
        toy.selector.begin_update(update)
        watched = {layer.probe is not None for layer in toy.layers.values()}
        assert watched == {(update - 1) % 20 < 5}
        toy.update(update)
        assert all(layer.probe is None for layer in toy.layers.values())


def test_fault_13_the_written_file_is_safetensors_with_sorted_positions(
    tiny_base: Base, make_model: Callable[..., SparseModel], tmp_path: Path
) -> None:
    model = make_model(tiny_base, density=0.02)
    file = tmp_path / "delta.safetensors"
    write_delta(file, model.adapter(method="random"))
    with safetensors.safe_open(file, "pt") as opened:
        assert len(opened.keys()) == 3 * len(model.layers)
    for delta in read_delta(file.read_bytes(), tiny_base.spec).modules.values():
        flat = delta.rows() * delta.width + delta.columns.long()
        assert bool((flat.diff() > 0).all())


def test_fault_13_positions_are_still_sorted_after_reselections(
    make_toy: Callable[..., Any],
) -> None:
    toy = make_toy()
    for update in range(1, 51):
        toy.update(update)
    for name in toy.layers:
        assert bool((toy.positions(name).diff() > 0).all())


def unbiased(gradients: list[float], *, beta: float) -> float:
    """Return a bias-corrected moving average, as Adam defines it, in float64."""
    average = 0.0
    for gradient in gradients:
        average = beta * average + (1 - beta) * gradient
    return average / (1 - beta ** len(gradients))


def outer(*, position: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [C, 1] and dy [R, 1] whose dW is `size` at one flat position, else 0."""
    x, dy = torch.zeros(SHAPE[1], 1), torch.zeros(SHAPE[0], 1)
    row, column = divmod(position, SHAPE[1])
    x[column], dy[row] = 1.0, size
    return x, dy
