"""AdamW with an age per value: PyTorch's own when all ages agree, calibrated when they do not."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.updaters.adamw import SparseAdamW, _correction
from spieldose_trainer.updaters.sm3 import SM3
from spieldose_trainer.updaters.updater import Updater


@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
def test_with_equal_ages_it_is_pytorchs_adamw(weight_decay: float) -> None:
    start = torch.randn(50, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 3e-3, "weight_decay": weight_decay}
    a = SparseAdamW([ours], **settings)
    b = torch.optim.AdamW([theirs], eps=1e-6, **settings)
    for gradient in gradients(30):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_young_values_are_corrected_exactly(beta: float) -> None:
    ages = torch.tensor([1.0, 2.0, 5.0, 100.0, 1e6])
    expected = 1 - beta ** ages.double()
    torch.testing.assert_close(_correction(beta, ages).double(), expected, rtol=3e-7, atol=0.0)


def test_decay_pulls_a_delta_without_gradient_to_zero() -> None:
    values = torch.nn.Parameter(torch.tensor([2.0, -4.0]))
    updater = SparseAdamW([values], lr=0.1, weight_decay=1.0)
    values.grad = torch.zeros(2)
    updater.step()
    torch.testing.assert_close(values.detach(), torch.tensor([1.8, -3.6]))


def test_values_without_a_gradient_stay() -> None:
    values = torch.nn.Parameter(torch.ones(2))
    SparseAdamW([values], lr=0.1, weight_decay=1.0).step()
    assert values.tolist() == [1.0, 1.0]


def test_seeding_some_values_leaves_the_others_alone() -> None:
    values = torch.nn.Parameter(torch.zeros(3))
    updater = SparseAdamW([values], lr=0.1)
    values.grad = torch.ones(3)
    updater.step()
    before = {name: moment.clone() for name, moment in updater.moments(values).items()}
    where = torch.tensor([False, True, False])
    updater.seed(values, where, mean=torch.ones(1), mean_square=torch.ones(1), age=5)
    for name, moment in updater.moments(values).items():
        assert torch.equal(moment[~where], before[name][~where])


def test_a_step_returns_the_closures_loss() -> None:
    values = torch.nn.Parameter(torch.ones(1))
    updater = SparseAdamW([values], lr=0.1)
    assert updater.step(lambda: 7.0) == 7.0


def test_a_run_restored_from_its_state_goes_on_bit_for_bit() -> None:
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(50))
    updater = SparseAdamW([whole], lr=1e-2, weight_decay=0.1)
    where = torch.arange(50) < 10
    updater.seed(whole, where, mean=torch.randn(10), mean_square=torch.rand(10), age=7)
    halves = list(gradients(10))
    advance(updater, whole, halves[:5])
    restored = torch.nn.Parameter(whole.detach().clone())
    second = SparseAdamW([restored], lr=9.0)
    second.load_state_dict(copy.deepcopy(updater.state_dict()))  # as from a file
    advance(updater, whole, halves[5:])
    advance(second, restored, halves[5:])
    assert torch.equal(whole, restored)
    assert torch.equal(updater.moments(whole)["age"], second.moments(restored)["age"])


@pytest.mark.parametrize("kind", ["adamw", "sm3"])
def test_moments_stay_float32_when_restored_for_other_values(
    make_trainable: Callable[..., TrainableDelta], kind: str
) -> None:
    def updater_of(layer: TrainableDelta) -> Updater:
        layer.values.data = layer.values.data.bfloat16()
        return SparseAdamW([layer.values], lr=0.1) if kind == "adamw" else SM3([layer], lr=0.1)

    layers = [make_trainable(torch.arange(0, 40, 2), shape=(5, 8)) for _ in range(2)]
    first, second = map(updater_of, layers)
    layers[0].values.grad = torch.linspace(-1, 1, 20).bfloat16()
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for name, entry in first.state[layers[0].values].items():
        assert second.state[layers[1].values][name].dtype == entry.dtype == torch.float32
        assert torch.equal(second.state[layers[1].values][name], entry)


def test_the_smallest_gradients_still_count_as_in_the_authors_code(
    make_trainable: Callable[..., TrainableDelta],
) -> None:
    """Their epsilon is 1e-6 beside AdamW's root, 1e-8 in SM3's."""
    for gradient, adamw in ((1e-6, 0.5), (1e-5, 1e-5 / 1.1e-5)):
        values = torch.nn.Parameter(torch.zeros(1))
        values.grad = torch.tensor([gradient])
        SparseAdamW([values], lr=1.0).step()
        torch.testing.assert_close(values.detach(), torch.tensor([-adamw]))
    layer = make_trainable(torch.arange(1), shape=(1, 1))
    layer.values.grad = torch.tensor([1e-4])
    SM3([layer], lr=1.0).step()
    torch.testing.assert_close(layer.values.detach(), torch.tensor([-(0.5**0.5)]))


def test_sm3_remembers_a_row_that_has_lost_its_entries(
    make_trainable: Callable[..., TrainableDelta],
) -> None:
    layer = make_trainable(torch.tensor([0, 5]), shape=(2, 4))
    updater = SM3([layer], lr=0.1)
    layer.values.grad = torch.tensor([3.0, 1.0])
    updater.step()
    layer.row_starts.copy_(torch.tensor([0, 0, 2]))  # both in the second row now
    layer.columns.copy_(torch.tensor([1, 2]))
    layer.values.grad = torch.ones(2)
    updater.step()
    row, column = updater.accumulators(layer.values)
    assert row.tolist() == [9.0, 2.0] and column.tolist() == [9.0, 2.0, 1.0, 0.0]


def gradients(count: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        yield torch.randn(50, generator=generator)


def advance(updater: SparseAdamW, values: torch.nn.Parameter, seen: list[torch.Tensor]) -> None:
    for gradient in seen:
        values.grad = gradient.clone()
        updater.step()
