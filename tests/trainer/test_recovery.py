"""Adam's step out of projected moments: bias correction, and second moments that cannot be."""

import numpy as np
import pytest
import torch

from spieldose_trainer.updaters.recovery import largest_ratio, recover_step
from spieldose_trainer.updaters.sketch import Sketch

BETAS = (0.9, 0.999)
SKETCH = Sketch(64, 40, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("updates", [1, 2, 10, 1000])
def test_steps_of_a_constant_gradient_are_its_sign_at_any_age(updates: int) -> None:
    gradient = {"positions": torch.tensor([[5, 60]]), "values": torch.tensor([[0.3, -2.0]])}
    first, second = 1 - BETAS[0] ** updates, 1 - BETAS[1] ** updates
    p = SKETCH.project(**gradient) * first
    q = SKETCH.project(gradient["positions"], gradient["values"].square()) * second
    assert steps(p, q, updates=updates) == pytest.approx({5: 1.0, 60: -1.0}, rel=1e-4)


def test_a_second_moment_below_zero_gives_the_largest_step_adam_can_make() -> None:
    where = torch.tensor([[5, 60]])
    p = SKETCH.project(where, torch.tensor([[0.1, -0.2]]))
    q = SKETCH.project(where, torch.tensor([[-1.0, -1e-9]]))
    largest = largest_ratio(BETAS, 7) ** 0.5
    assert steps(p, q, updates=7) == pytest.approx({5: largest, 60: -largest}, rel=1e-3)


def test_the_bound_is_reached_by_some_gradients_and_passed_by_none() -> None:
    generator = np.random.default_rng(0)
    for updates in (1, 2, 5, 50):
        bound = largest_ratio(BETAS, updates)
        steepest = (BETAS[0] / BETAS[1]) ** np.arange(updates)[::-1]
        assert squared_step(steepest) == pytest.approx(bound)
        drawn = [generator.standard_normal(updates) + generator.normal() for _ in range(200)]
        assert max(squared_step(gradients) for gradients in drawn) <= bound * (1 + 1e-9)


def test_the_usual_betas_bound_a_step_by_seven_learning_rates() -> None:
    assert largest_ratio(BETAS, 1) == pytest.approx(1.0)
    assert largest_ratio(BETAS, 100_000) ** 0.5 == pytest.approx(7.27, abs=0.01)


def test_blocks_of_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    settings = {"count": 3, "updates": 4, "betas": BETAS, "eps": 1e-6}
    whole = recover_step(p, q, SKETCH, **settings)
    monkeypatch.setattr("spieldose_trainer.updaters.recovery.TILE", 128)  # two chunks
    parts = recover_step(p, q, SKETCH, **settings)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_weight_that_never_has_a_gradient_does_not_move(scale: float) -> None:
    """Of four positions found three are of rounding alone."""
    draw = torch.Generator().manual_seed(0)
    where = torch.randint(64, (500, 1), generator=draw)
    p, q = torch.zeros(2, 500, 40)
    for updates in range(1, 11):
        gradient = torch.randn(500, 1, generator=draw) * scale
        p.lerp_(SKETCH.project(where, gradient), 1 - BETAS[0])
        q.lerp_(SKETCH.project(where, gradient.square()), 1 - BETAS[1])
        settings = {"count": 4, "updates": updates, "betas": BETAS, "eps": 1e-6}
        positions, step = recover_step(p, q, SKETCH, **settings)
        assert not step[positions != where].any()
        assert int(step[positions == where].count_nonzero()) == 500


def steps(p: torch.Tensor, q: torch.Tensor, *, updates: int) -> dict[int, float]:
    """Return the recovered steps of one chunk by position."""
    positions, step = recover_step(p, q, SKETCH, count=2, updates=updates, betas=BETAS, eps=1e-12)
    return dict(zip(positions[0].tolist(), step[0].tolist(), strict=True))


def squared_step(gradients: np.ndarray) -> float:
    """Return m̂²/v̂ after a series of gradients, oldest first, as Adam is defined."""
    m = v = 0.0
    for gradient in gradients:
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
    first, second = (1 - beta ** len(gradients) for beta in BETAS)
    return float((m / first) ** 2 / (v / second))
