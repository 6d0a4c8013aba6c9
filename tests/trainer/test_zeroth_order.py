"""Zeroth order: the slope is the directional derivative, and a step is two forward passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.loop import Loop
from spieldose_trainer.trainer import Trainer, train
from spieldose_trainer.updaters.zeroth_order import ZerothOrder

from .configuration import Configure

SHAPE = (6, 5)
TOKENS = 7


@pytest.fixture
def layer(make_trainable: Callable[..., TrainableDelta]) -> TrainableDelta:
    layer = make_trainable(torch.arange(0, 30, 3), shape=SHAPE)
    layer.values.data = torch.linspace(-1, 1, 10)
    return layer


def loss(layer: TrainableDelta) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, SHAPE[1], generator=generator)
    y = torch.randn(TOKENS, SHAPE[0], generator=generator)
    return layer.add_to(y, x).sin().square().sum()


def observed(layer: TrainableDelta, updater: ZerothOrder) -> float:
    """Return the slope after one observation."""
    losses = []
    for sign in (1, -1):
        with torch.no_grad(), updater.perturbed(sign):
            losses.append(float(loss(layer).double()))
    updater.observe(*losses)
    return updater._slope


def test_the_slope_is_the_derivative_along_the_direction(layer: TrainableDelta) -> None:
    (gradient,) = torch.autograd.grad(loss(layer), layer.values)
    for seed in range(5):
        updater = ZerothOrder([layer], lr=0.1, epsilon=1e-2, seed=seed)
        expected = float(gradient @ updater.direction(0))
        assert observed(layer, updater) == pytest.approx(expected, rel=0.02, abs=0.05)


def test_the_mean_step_is_the_gradient(layer: TrainableDelta) -> None:
    (gradient,) = torch.autograd.grad(loss(layer), layer.values)
    before, draws = layer.values.detach().clone(), 4000
    total = torch.zeros_like(before)
    for seed in range(draws):
        updater = ZerothOrder([layer], lr=1.0, epsilon=1e-2, seed=seed)
        observed(layer, updater)
        updater.step()
        total += before - layer.values.detach()
        layer.values.data.copy_(before)
    # one draw's component deviates by about |gradient|, the mean of all by √draws less
    assert (total / draws - gradient).abs().max() < 4 * gradient.norm() / draws**0.5


def test_the_values_are_untouched_until_the_step(layer: TrainableDelta) -> None:
    before = layer.values.detach().clone()
    updater = ZerothOrder([layer], lr=0.1)
    slope = observed(layer, updater)
    assert torch.equal(layer.values, before)
    direction = updater.direction(0)
    updater.step()
    torch.testing.assert_close(layer.values.detach(), before - 0.1 * slope * direction)


def test_every_update_and_every_layer_take_another_direction(
    layer: TrainableDelta, make_trainable: Callable[..., TrainableDelta]
) -> None:
    updater = ZerothOrder([layer, make_trainable(torch.arange(10), shape=SHAPE)], lr=0.1)
    first, other_layer = updater.direction(0), updater.direction(1)
    updater.step()
    assert not torch.equal(first, updater.direction(0))
    assert not torch.equal(first, other_layer)


def test_the_directions_are_standard_normal() -> None:
    wide = TrainableDelta(torch.tensor([0, 100_000]).int(), torch.arange(100_000).int(), width=1)
    z = ZerothOrder([wide], lr=0.1, seed=3).direction(0)
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.std()) - 1) < 0.02


def test_slopes_of_several_batches_add_up(layer: TrainableDelta) -> None:
    updater = ZerothOrder([layer], lr=0.1, epsilon=0.5)
    updater.observe(3.0, 1.0)
    updater.observe(2.0, 4.5)
    assert updater._slope == pytest.approx(2.0 - 2.5)


def test_an_update_makes_two_forward_passes_and_no_backward_pass(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    trainer = Trainer(
        configure(method="zo", selector="random", max_steps=3, accumulation=2, batch_size=5)
    )
    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    kept = []
    trainer.model.register_forward_hook(lambda *arguments: kept.append(arguments[2].logits.grad_fn))
    trainer.train()
    assert kept == [None] * (3 * 2 * 2)  # updates, batches, signs; no graph, hence no activations


def test_there_are_no_optimiser_bytes(configure: Configure) -> None:
    trainer = Trainer(configure(method="zo", selector="random", max_steps=2))
    trainer.train()
    assert not trainer._loop.updater.state
    assert all(layer.values.grad is None for layer in trainer.model.layers.values())


def test_a_run_lowers_the_loss(configure: Configure) -> None:
    losses = train(
        configure(method="zo", selector="random", max_steps=150, learning_rate=3e-3, density=0.02)
    ).losses
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])


def test_dropout_has_no_part_in_the_slope(configure: Configure) -> None:
    with_dropout, without = (
        Trainer(configure(method="zo", selector="random", max_steps=3)) for _ in range(2)
    )
    for layer in with_dropout.base.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert with_dropout.train().losses == without.train().losses


def test_accumulated_batches_move_as_one_big_batch(configure: Configure) -> None:
    settings: dict[str, Any] = {"method": "zo", "selector": "random", "max_steps": 2}
    whole = Trainer(configure(batch_size=10, **settings))
    parts = Trainer(configure(batch_size=2, accumulation=5, **settings))
    for trainer in (whole, parts):
        trainer.train()
    for name, layer in whole.model.layers.items():
        assert bool(layer.values.any())
        torch.testing.assert_close(
            parts.model.layers[name].values, layer.values, rtol=0.02, atol=1e-5
        )
    assert isinstance(whole._loop, Loop)
