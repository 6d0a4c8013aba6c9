"""Which positions leave and enter the support, checked against sets and against a dense run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.selectors.accumulated_gradients import (
    AccumulatedGradients,
    choose_exchange,
)
from spieldose_trainer.selectors.candidates import Candidates
from spieldose_trainer.selectors.momentum import MomentumApproximation
from spieldose_trainer.selectors.principal import Principal
from spieldose_trainer.selectors.schedule import RefreshSchedule, ReselectionSchedule
from spieldose_trainer.support import exchange, flat_positions
from spieldose_trainer.updaters.adamw import SparseAdamW
from spieldose_trainer.updaters.sm3 import SM3

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


@pytest.mark.parametrize("candidates", [[], [5], [4, 5, 6]])
def test_no_more_are_dropped_than_there_is_to_grow(candidates: list[int]) -> None:
    keep, grow = choose_exchange(
        torch.tensor([2, 3, 5, 7]),
        torch.tensor([0.2, 0.1, -9.0, 0.3]),
        torch.tensor(candidates, dtype=torch.int64),
        torch.ones(len(candidates)),
        count=3,
    )
    grown = [i for i, position in enumerate(candidates) if position != 5]
    assert grow.tolist() == grown
    assert keep.tolist() == [len(grown) < 2, len(grown) < 1, True, True]


@pytest.mark.parametrize("reached", [0, 1, 3])
def test_nothing_is_grown_where_there_is_no_gradient(
    make_trainable: Callable[..., TrainableDelta], reached: int
) -> None:
    """Of ten columns only the first few see an input that is not 0."""
    layer = make_trainable(torch.arange(0, 100, 5), shape=(10, 10))
    layer.values.data.copy_(torch.arange(1.0, 21.0))
    updater = SparseAdamW([layer.values], lr=0.1)
    schedule = ReselectionSchedule(every=9, steps=1, initial_rate=0.5, decay="linear", total=9)
    selector = AccumulatedGradients({"a": layer}, updater=updater, schedule=schedule)
    selector.begin_update(1)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    x[:, reached:] = 0.0
    layer.add_to(torch.zeros(4, 10), x).sum().backward()
    before = set(flat_positions(layer).tolist())
    replaced = selector.end_update(1)
    after = set(flat_positions(layer).tolist())
    within = {position for position in range(100) if position % 10 < reached}
    assert after - before <= within
    assert len(after & within) == min(20, len(within))
    assert len(after) == len(before) == 20
    assert replaced == len(after - before)
    assert bool(selector.lost) == (replaced > 0)


def test_lost_is_the_share_of_the_norm_that_left(
    make_trainable: Callable[..., TrainableDelta],
) -> None:
    layer = make_trainable(torch.arange(4), shape=(2, 4))
    layer.values.data.copy_(torch.tensor([3.0, 1.0, -2.0, 4.0]))
    updater = SparseAdamW([layer.values], lr=0.1)
    schedule = RefreshSchedule(every=1, total=2)
    selector = Principal(
        {"a": layer}, updater=updater, schedule=schedule, scores=lambda _: torch.arange(8.0)
    )
    layer.values.data[3] = 0.0  # no longer: 9 + 1 + 4, of which all leave
    assert selector.end_update(1) == 4
    assert selector.lost == 1.0
    layer.values.data.copy_(torch.tensor([3.0, 1.0, -2.0, 4.0]))
    selector._scores = lambda _: torch.tensor([0.0, 1, 0, 0, 9, 0, 9, 9])  # 5 leaves for 1
    assert selector.end_update(1) == 1
    assert selector.lost == pytest.approx((1 / 30) ** 0.5)


def test_principal_survivors_carry_value_moments_and_age(
    make_trainable: Callable[..., TrainableDelta],
) -> None:
    layer = make_trainable(torch.tensor([1, 3, 4, 7]), shape=(2, 4))
    layer.values.data.copy_(torch.tensor([1.0, 3.0, 4.0, 7.0]))
    updater = SparseAdamW([layer.values], lr=0.1)
    for shift, moment in enumerate(updater.moments(layer.values).values(), start=1):
        moment.copy_(layer.values.detach() + 10 * shift)
    scores = torch.zeros(8)
    scores[[0, 3, 6, 7]] = 1.0
    selector = Principal(
        {"a": layer},
        updater=updater,
        schedule=RefreshSchedule(every=2, total=9),
        scores=lambda _: scores,
    )
    assert selector.end_update(1) == 0
    assert selector.end_update(4) == 2
    assert flat_positions(layer).tolist() == [0, 3, 6, 7]
    assert layer.values.tolist() == [0.0, 3.0, 0.0, 7.0]
    for shift, moment in enumerate(updater.moments(layer.values).values(), start=1):
        assert moment.tolist() == [0.0, 3.0 + 10 * shift, 0.0, 7.0 + 10 * shift]
    assert layer.born.tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dead", [0, 1, 3])
def test_spiel_ma_keeps_the_size_of_a_support_with_dead_columns(
    make_trainable: Callable[..., TrainableDelta], density: float, dead: int
) -> None:
    generator = torch.Generator().manual_seed(dead)
    size = max(1, int(density * 20))
    layer = make_trainable(torch.randperm(20, generator=generator)[:size], shape=(4, 5))
    layer.values.data.copy_(torch.randn(size, generator=generator))
    updater = SM3([layer], lr=0.1)
    row, column = updater.accumulators(layer.values)
    row.copy_(torch.rand(4, generator=generator))
    column.copy_(torch.rand(5, generator=generator))
    column[:dead] = 0.0
    schedule = ReselectionSchedule(every=5, steps=2, initial_rate=0.5, decay="linear", total=9)
    selector = MomentumApproximation({"a": layer}, updater=updater, schedule=schedule)
    before = set(flat_positions(layer).tolist())
    replaced = selector.reselect("a", 2)  # all that can be
    after = set(flat_positions(layer).tolist())
    assert len(after) == size
    assert len(after - before) == replaced
    assert all(position % 5 >= dead for position in after - before)


def test_a_run_may_change_its_support_any_number_of_times(
    make_trainable: Callable[..., TrainableDelta],
) -> None:
    layer = make_trainable(torch.tensor([1, 2]), shape=(2, 3))
    keep = torch.tensor([True, False])
    exchange(layer, keep=keep, grown=torch.tensor([5]), number=1 << 20)
    assert layer.born.tolist() == [0, torch.iinfo(torch.int16).max]


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


@pytest.mark.parametrize("normalised", [False, True])
def test_few_entries_follow_a_dense_float64_run_over_accumulated_updates(
    make_toy: Callable[..., Any], normalised: bool
) -> None:
    toy = make_toy(every=10, accumulation=3, density=0.1, normalised=normalised)
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


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_what_joins_the_first_update_late_does_not_count_in_it(updates: int) -> None:
    draw = torch.Generator().manual_seed(0)
    candidates = Candidates((20, 30), count=12, room=24)
    gradients = torch.zeros(updates, 20 * 30)
    first = torch.zeros(20 * 30)  # of the first update, from the pass on in which it was kept
    for update in range(updates):
        for _ in range(3):
            x, dy = torch.randn(30, 2, generator=draw), torch.randn(20, 2, generator=draw)
            gradients[update] += (dy @ x.t()).flatten()
            candidates.observe(x, dy)
            if update == 0:
                first[candidates.positions] = candidates._update
        candidates.finish_update()
    at, counts = candidates.positions, candidates.counts()
    late = (first - gradients[0]).abs()[at] > 1e-4
    assert 0 < int(late.sum()) < 12
    gradients[0, at] = first[at]
    if updates > 1:
        gradients[0, at[late]] = 0.0
    assert torch.equal(counts, updates - late.float() * (updates > 1))
    torch.testing.assert_close(candidates.total, gradients[:, at].sum(0))
    torch.testing.assert_close(candidates.total_square, gradients[:, at].square().sum(0))
    torch.testing.assert_close(candidates.scores() / updates, gradients[:, at].sum(0) / counts)


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


@pytest.mark.parametrize("scale", [1e-10, 1e-23, 1e-30])
def test_a_row_that_is_all_but_shut_off_is_not_the_most_correlated(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x, dy = torch.randn(6, 50, generator=draw), torch.randn(4, 50, generator=draw)
    scores = []
    for factor in (1.0, scale):
        candidates = Candidates((4, 6), count=24, normalised=True)
        candidates.observe(x, dy * torch.tensor([1, 1, factor, 1])[:, None])
        candidates.finish_update()
        scores.append(candidates.scores())
    torch.testing.assert_close(*scores)


def test_a_phase_begins_where_a_layer_first_has_a_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    late, whole = (Candidates((4, 6), count=8) for _ in range(2))
    late.finish_update()  # that part of the model did not run
    for _ in range(2):
        x, dy = torch.randn(6, 5, generator=draw), torch.randn(4, 5, generator=draw)
        for candidates in (late, whole):
            candidates.observe(x, dy)
            candidates.finish_update()
    assert torch.equal(late.positions, whole.positions)
    assert torch.equal(late.scores(), whole.scores())
    assert torch.equal(late.counts(), whole.counts())


def test_what_joined_late_is_known_after_a_resumption() -> None:
    draw = torch.Generator().manual_seed(0)
    candidates = Candidates((20, 30), count=12, room=24)
    for _ in range(2):
        for _ in range(3):
            x, dy = torch.randn(30, 2, generator=draw), torch.randn(20, 2, generator=draw)
            candidates.observe(x, dy)
        candidates.finish_update()
    resumed = Candidates((20, 30), count=12, room=24)
    resumed.load_state_dict(candidates.state_dict())
    assert candidates.counts().min() < candidates.counts().max()
    assert torch.equal(resumed.counts(), candidates.counts())


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
