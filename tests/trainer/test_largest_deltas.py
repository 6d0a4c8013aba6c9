"""Which deltas stay when an update may touch any weight, and what eviction costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spieldose_trainer.selectors.largest_deltas import LargestDeltas, add_changes
from spieldose_trainer.support import flat_positions
from spieldose_trainer.updaters.compressed_adam import CompressedAdam
from spieldose_trainer.updaters.compression import Compression

SHAPE = (3, 5)


def test_changes_are_added_within_the_support_and_compete_outside(
    make_trainable: Callable[..., Any],
) -> None:
    layer = holding(make_trainable, {1: 5.0, 4: -1.0, 9: 2.0, 14: -0.5})
    replaced, evicted = change(layer, {1: -4.5, 3: 3.0, 7: -0.8, 14: -0.1, 12: 0.2})
    assert deltas(layer) == pytest.approx({3: 3.0, 4: -1.0, 7: -0.8, 9: 2.0})
    assert replaced == 2
    assert evicted == pytest.approx(0.5**2 + 0.6**2 + 0.2**2)


def test_what_was_evicted_comes_back_with_its_new_change_alone(
    make_trainable: Callable[..., Any],
) -> None:
    layer = holding(make_trainable, {2: 1.0, 6: 5.0})
    change(layer, {8: 2.0})
    change(layer, {2: 3.0})
    assert deltas(layer) == pytest.approx({2: 3.0, 6: 5.0})


def test_a_change_nobody_gives_way_to_is_lost(make_trainable: Callable[..., Any]) -> None:
    layer = holding(make_trainable, {2: 1.0, 6: 5.0})
    assert change(layer, {8: 0.5, 9: -0.25}) == (0, 0.5**2 + 0.25**2)
    assert deltas(layer) == {2: 1.0, 6: 5.0}


def test_no_change_leaves_everything_where_it_is(make_trainable: Callable[..., Any]) -> None:
    layer = holding(make_trainable, {2: 1.0, 6: 0.0})
    assert change(layer, {}) == (0, 0.0)
    assert deltas(layer) == {2: 1.0, 6: 0.0}


def test_changes_beyond_the_last_entry_of_the_support_compete(
    make_trainable: Callable[..., Any],
) -> None:
    layer = holding(make_trainable, {2: 1.0, 6: 5.0})
    assert change(layer, {14: 2.0}) == (1, 1.0)
    assert deltas(layer) == {6: 5.0, 14: 2.0}


def test_the_layers_tensors_are_exchanged_in_place(make_trainable: Callable[..., Any]) -> None:
    layer = holding(make_trainable, {2: 1.0, 6: 5.0})
    before = [t.data_ptr() for t in (layer.row_starts, layer.columns, layer.values)]
    change(layer, {8: 2.0})
    assert before == [t.data_ptr() for t in (layer.row_starts, layer.columns, layer.values)]
    assert layer.values.requires_grad
    assert int(layer.row_starts[-1]) == 2


def test_the_lost_norm_is_that_of_the_evicted_over_that_of_all(
    make_trainable: Callable[..., Any],
) -> None:
    layers = {
        "a": holding(make_trainable, {1: 3.0, 2: 1.0}),
        "b": holding(make_trainable, {0: 2.0, 5: -2.0}),
    }
    selector = over(layers)
    first = {"a": {3: 2.0}, "b": {7: 0.5}}  # evicts 1.0 and 0.5
    assert after(selector, layers, first) == 1
    kept = 3.0**2 + 2.0**2 + 2 * 2.0**2
    assert selector.lost == pytest.approx((1.25 / (1.25 + kept)) ** 0.5)
    assert selector.lost_over_run == pytest.approx(selector.lost)
    second = {"a": {1: 1.0, 14: -1.0}, "b": {}}  # evicts 1.0; position 1 grows to 4
    assert after(selector, layers, second) == 0
    kept += 4.0**2 - 3.0**2
    assert selector.lost == pytest.approx((1 / (1 + kept)) ** 0.5)
    assert selector.lost_over_run == pytest.approx((2.25 / (2.25 + kept)) ** 0.5)


def test_what_the_updater_leaves_out_is_lost_too(make_trainable: Callable[..., Any]) -> None:
    layers = {"a": holding(make_trainable, {1: 3.0, 2: 4.0})}
    selector = over(layers)
    after(selector, layers, {"a": {}}, omitted=75.0)
    assert selector.lost == pytest.approx((75 / 100) ** 0.5)


def test_a_run_that_evicts_nothing_loses_nothing(make_trainable: Callable[..., Any]) -> None:
    layers = {"a": holding(make_trainable, {1: 0.0, 2: 0.0})}
    selector = over(layers)
    assert after(selector, layers, {"a": {}}) == 0
    assert selector.lost == selector.lost_over_run == 0.0


def test_layers_are_watched_within_an_update_only(make_trainable: Callable[..., Any]) -> None:
    layers = {"a": holding(make_trainable, {1: 0.0, 2: 0.0})}
    selector = over(layers)
    assert layers["a"].probe is None
    selector.begin_update(1)
    layers["a"].add_to(torch.zeros(2, 3), torch.ones(2, 5)).sum().backward()
    selector.updater.step()
    assert selector.end_update(1) > 0
    assert layers["a"].probe is None


def holding(make_trainable: Callable[..., Any], held: dict[int, float]) -> Any:
    """Make a layer with these deltas by flat position."""
    layer = make_trainable(torch.tensor(sorted(held)), shape=SHAPE)
    layer.values.data.copy_(torch.tensor([held[p] for p in sorted(held)]))
    return layer


def change(layer: Any, changes: dict[int, float]) -> tuple[int, float]:
    return add_changes(layer, *entries(changes), number=1)


def entries(changes: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    positions = sorted(changes)
    return (
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor([changes[p] for p in positions], dtype=torch.float32),
    )


def deltas(layer: Any) -> dict[int, float]:
    positions = flat_positions(layer).tolist()
    assert positions == sorted(set(positions))
    return dict(zip(positions, layer.values.tolist(), strict=True))


def over(layers: dict[str, Any]) -> LargestDeltas:
    compression = Compression(chunk=8, kept=2, measurements=6)
    updater = CompressedAdam(layers, lr=0.1, compression=compression)
    return LargestDeltas(layers, updater=updater)


def after(
    selector: LargestDeltas,
    layers: dict[str, Any],
    changes: dict[str, dict[int, float]],
    *,
    omitted: float = 0.0,
) -> int:
    """End an update in which the updater wants these changes."""
    selector.updater.changes = {name: entries(changes[name]) for name in layers}
    selector.updater.omitted = dict.fromkeys(layers, omitted)
    return selector.end_update(1)
