"""Which positions leave and enter the support, checked against sets and against a dense run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.selectors.accumulated_gradients import choose_exchange
from spieldose_trainer.selectors.candidates import Candidates
from spieldose_trainer.support import exchange, flat_positions
from spieldose_trainer.updaters.adamw import SparseAdamW

from .dense_run import DenseGradientRun, DenseMomentumRun, assert_follows

SHAPE = (6, 7)


@dataclass(frozen=True)
class Case:
    """A support and its candidates, with distinct magnitudes so that every choice is unique."""

    active: torch.Tensor
    values: torch.Tensor
    candidates: torch.Tensor
    gradients: torch.Tensor
    count: int

    def choose(self) -> tuple[set[int], set[int]]:
        keep, grow = choose_exchange(
            self.active, self.values, self.candidates, self.gradients, count=self.count
        )
        return set(self.active[keep].tolist()), set(self.candidates[grow].tolist())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    everywhere = st.permutations(range(SHAPE[0] * SHAPE[1]))
    size = draw(st.integers(1, 20))
    candidates = draw(st.integers(size, SHAPE[0] * SHAPE[1]))
    return Case(
        active=torch.tensor(sorted(draw(everywhere)[:size])),
        values=distinct(draw, size),
        candidates=torch.tensor(sorted(draw(everywhere)[:candidates])),
        gradients=distinct(draw, candidates),
        count=draw(st.integers(0, size)),
    )


@given(cases())
def test_the_smallest_values_leave_and_the_largest_gradients_enter(case: Case) -> None:
    value = dict(zip(case.active.tolist(), case.values.abs().tolist(), strict=True))
    gradient = dict(zip(case.candidates.tolist(), case.gradients.abs().tolist(), strict=True))
    dropped = set(sorted(value, key=value.__getitem__)[: case.count])
    free = set(gradient) - (set(value) - dropped)
    grown = set(sorted(free, key=gradient.__getitem__, reverse=True)[: case.count])
    assert case.choose() == (set(value) - (dropped - grown), grown - dropped)


@given(cases())
def test_an_exchange_never_changes_the_size_of_the_support(case: Case) -> None:
    kept, grown = case.choose()
    assert not kept & grown
    assert len(kept) + len(grown) == case.active.numel()


def test_a_survivor_with_the_largest_gradient_is_not_grown_again() -> None:
    keep, grow = choose_exchange(
        torch.tensor([3, 5]),
        torch.tensor([0.1, -9.0]),
        torch.tensor([4, 5, 6]),
        torch.tensor([1.0, 100.0, -2.0]),
        count=1,
    )
    assert keep.tolist() == [False, True]
    assert grow.tolist() == [2]


def test_a_position_both_dropped_and_grown_is_kept() -> None:
    keep, grow = choose_exchange(
        torch.tensor([3, 5]),
        torch.tensor([0.1, 9.0]),
        torch.tensor([3, 4]),
        torch.tensor([-5.0, 1.0]),
        count=1,
    )
    assert keep.tolist() == [True, True]
    assert grow.tolist() == []


@given(cases())
def test_survivors_carry_their_value_and_moments_and_newcomers_start_at_zero(case: Case) -> None:
    layer, updater = populated(case)
    before = table(layer, updater)
    kept, grown = exchanged(case, layer, updater)
    zeros = (0.0, 0.0, 0.0, 0.0)
    expected = {p: before[p] if p in kept else zeros for p in kept | grown}
    assert table(layer, updater) == expected


@given(cases())
def test_the_support_stays_sorted(case: Case) -> None:
    layer, updater = populated(case)
    exchanged(case, layer, updater)
    positions = flat_positions(layer)
    assert bool((positions.diff() > 0).all())
    assert int(layer.row_starts[-1]) == positions.numel()


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_sixty_updates_follow_a_dense_float64_run(
    make_toy: Callable[..., Any], decay: str, weight_decay: float
) -> None:
    toy = make_toy(every=10, decay=decay, weight_decay=weight_decay)
    assert_follows(toy, DenseGradientRun(toy))


@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_sixty_updates_of_spiel_ma_follow_a_dense_float64_run(
    make_toy: Callable[..., Any], accumulation: int, weight_decay: float
) -> None:
    toy = make_toy(
        method="spiel-ma", every=10, accumulation=accumulation, weight_decay=weight_decay
    )
    assert_follows(toy, DenseMomentumRun(toy))


@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma"])
def test_the_least_changed_since_the_last_reselection_may_leave_instead(
    make_toy: Callable[..., Any], method: str
) -> None:
    toy = make_toy(method=method, every=10, since_reselection=True)
    dense = DenseGradientRun if method == "spiel-ag" else DenseMomentumRun
    assert_follows(toy, dense(toy))


def test_newcomers_may_start_without_momentum(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(every=10, seed_momentum=False)
    assert_follows(toy, DenseGradientRun(toy))


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_updates_follow_a_dense_float64_run(
    make_toy: Callable[..., Any], accumulation: int
) -> None:
    toy = make_toy(every=10, accumulation=accumulation)
    assert_follows(toy, DenseGradientRun(toy))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_growth_by_correlation_follows_a_dense_float64_run(
    make_toy: Callable[..., Any], accumulation: int
) -> None:
    toy = make_toy(every=10, accumulation=accumulation, normalised=True)
    assert_follows(toy, DenseGradientRun(toy))


@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma"])
def test_a_first_rate_of_its_own_follows_a_dense_float64_run(
    make_toy: Callable[..., Any], method: str
) -> None:
    toy = make_toy(method=method, every=10, first_rate=0.5)
    dense = DenseGradientRun if method == "spiel-ag" else DenseMomentumRun
    assert_follows(toy, dense(toy))


def test_a_layer_without_input_grows_nowhere_by_correlation() -> None:
    candidates = Candidates((3, 4), count=12, normalised=True)
    x, dy = torch.randn(4, 5), torch.randn(3, 5)
    x[1], dy[2] = 0.0, 0.0
    candidates.observe(x, dy)
    candidates.finish_update()
    dead = (candidates.positions % 4 == 1) | (candidates.positions // 4 == 2)
    assert bool((candidates.scores()[dead] == 0).all())
    assert bool((candidates.scores()[~dead].abs() > 0).all())
    assert bool((candidates.scores().abs() <= 1 + 1e-6).all())


def test_padding_does_not_change_a_correlation() -> None:
    draw = torch.Generator().manual_seed(0)
    x, dy = torch.randn(4, 6, generator=draw), torch.randn(3, 6, generator=draw)
    dy[:, 4:] = 0  # what no loss counts
    scores = []
    for length in (4, 6):
        candidates = Candidates((3, 4), count=12, normalised=True)
        candidates.observe(x[:, :length], dy[:, :length])
        candidates.finish_update()
        scores.append(candidates.scores())
    torch.testing.assert_close(*scores)


def test_the_layers_backward_passes_are_not_watched_before_the_run(
    make_toy: Callable[..., Any],
) -> None:
    assert all(layer.probe is None for layer in make_toy().layers.values())


@pytest.mark.parametrize("normalised", [False, True])
def test_a_selector_restored_within_a_phase_chooses_the_same(
    make_toy: Callable[..., Any], normalised: bool
) -> None:
    whole, broken = make_toy(normalised=normalised), make_toy(normalised=normalised)
    for update in range(1, 4):
        whole.update(update)
        broken.update(update)
    state = broken.selector.state_dict()
    broken.selector.candidates = {}
    broken.selector.load_state_dict(state)
    for update in range(4, 6):
        whole.update(update)
        broken.update(update)
    for name in whole.layers:
        assert torch.equal(whole.positions(name), broken.positions(name))
        assert torch.equal(whole.moment(name, "exp_avg"), broken.moment(name, "exp_avg"))


def test_a_selector_between_phases_has_nothing_to_save(make_toy: Callable[..., Any]) -> None:
    toy = make_toy()
    for update in range(1, 7):
        toy.update(update)
    assert toy.selector.state_dict() == {"candidates": {}}


def distinct(draw: st.DrawFn, size: int) -> torch.Tensor:
    order = draw(st.permutations(range(1, size + 1)))
    signs = draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=size, max_size=size))
    return torch.tensor(order) * torch.tensor(signs)


def populated(case: Case) -> tuple[TrainableDelta, SparseAdamW]:
    """Make a layer over the case's support whose moments are as telling as its values."""
    rows, columns = case.active // SHAPE[1], case.active % SHAPE[1]
    row_starts = torch.searchsorted(rows, torch.arange(SHAPE[0] + 1)).int()
    layer = TrainableDelta(row_starts, columns.int(), width=SHAPE[1])
    layer.values.data.copy_(case.values)
    updater = SparseAdamW([layer.values], lr=0.1)
    for shift, moment in enumerate(updater.moments(layer.values).values(), start=1):
        moment.copy_(case.values + 100 * shift)
    return layer, updater


def exchanged(case: Case, layer: TrainableDelta, updater: SparseAdamW) -> tuple[set[int], set[int]]:
    keep, grow = choose_exchange(
        case.active, case.values, case.candidates, case.gradients, count=case.count
    )
    grown = case.candidates[grow]
    entries = updater.moments(layer.values).values()
    exchange(layer, keep=keep, grown=grown, number=3, entries=entries)
    return set(case.active[keep].tolist()), set(grown.tolist())


def table(layer: TrainableDelta, updater: SparseAdamW) -> dict[int, tuple[float, ...]]:
    """Return value and moments by position."""
    columns = [layer.values.detach(), *updater.moments(layer.values).values()]
    rows = torch.stack(columns, dim=1).tolist()
    return dict(zip(flat_positions(layer).tolist(), map(tuple, rows), strict=True))
