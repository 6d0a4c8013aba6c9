"""The first support: the largest scores within every layer or over all, checked densely."""

from typing import Any

import pytest
import torch

from spieldose_kernels.base import Base, dense_weight
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import collate
from spieldose_trainer.parts import first_support
from spieldose_trainer.selectors import scores
from spieldose_trainer.selectors.first_support import best_support, random_support
from spieldose_trainer.support import flat_positions
from spieldose_trainer.trainer import Trainer

from .configuration import Configure

SHAPES = {"a": (4, 6), "b": (3, 5)}


def test_each_layer_gets_the_same_share_of_its_own_best() -> None:
    values = draws()
    found = best_support(SHAPES, 0.25, allocation="layer", scores=values.items())
    for name, score in values.items():
        assert found[name].tolist() == sorted(score.topk(score.numel() // 4).indices.tolist())


@pytest.mark.parametrize("tile", [4, 1 << 20])
def test_globally_the_best_of_all_layers_win_in_whatever_order_they_come(
    monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    monkeypatch.setattr("spieldose_trainer.selectors.first_support.TILE", tile)
    values = draws()
    values["a"] += 1.0
    found = best_support(SHAPES, 0.5, allocation="global", scores=reversed(values.items()))
    pairs = [(float(s), n, i) for n, score in values.items() for i, s in enumerate(score)]
    best = sorted(pairs, reverse=True)[: (24 + 15) // 2]
    for name in SHAPES:
        assert found[name].tolist() == sorted(i for _, n, i in best if n == name)


def test_a_layer_without_good_scores_may_get_nothing() -> None:
    values = {"a": torch.rand(24) + 1, "b": torch.rand(15)}
    found = best_support(SHAPES, 0.1, allocation="global", scores=values.items())
    assert found["b"].numel() == 0
    assert found["a"].numel() == 3


def test_the_random_support_depends_on_the_seed_alone() -> None:
    one, same, other = (random_support(SHAPES, 0.5, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in SHAPES)
    assert not all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_magnitude_takes_the_largest_weights(configure: Configure, tiny_base: Base) -> None:
    for name, positions in support(configure(method="magnitude"), tiny_base).items():
        weight = dense_weight(tiny_base.layers[name], torch.float32).abs().flatten()
        chosen = weight[positions]
        weight[positions] = 0
        assert chosen.min() >= weight.max()


def test_row_topk_gives_every_row_as_many(configure: Configure, tiny_base: Base) -> None:
    for name, positions in support(configure(method="row-topk"), tiny_base).items():
        weight = dense_weight(tiny_base.layers[name], torch.float32).abs()
        mask = torch.zeros_like(weight).flatten().index_fill(0, positions, 1.0).view_as(weight)
        assert mask.sum(1).unique().tolist() == [int(0.05 * weight.shape[1])]
        lowest = torch.where(mask.bool(), weight, torch.inf).amin(1)
        assert bool((lowest >= torch.where(mask.bool(), 0.0, weight).amax(1)).all())


@pytest.mark.parametrize("rank", [1, 4, 128])
def test_principal_scores_are_those_of_the_truncated_svd(rank: int) -> None:
    for shape in ((9, 14), (14, 9)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        left, sizes, right = torch.linalg.svd(weight.double(), full_matrices=False)
        low = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        found = scores.principal(weight, rank=rank).view(shape)
        torch.testing.assert_close(found.double(), low.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [1 << 28, 5000])
def test_fisher_scores_are_the_mean_of_squared_dense_gradients(
    configure: Configure, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr("spieldose_trainer.parts.BUDGET", budget)
    config = configure(method="fisher", quantised=False, allocation="global")
    trainer = Trainer(config)
    expected = dense_fisher(trainer)
    count = sum(positions.numel() for positions in chosen(trainer).values())
    assert count == int(0.05 * sum(score.numel() for score in expected.values()))
    lowest = min(float(expected[n][p].min()) for n, p in chosen(trainer).items() if p.numel())
    left_out = max(
        float(expected[n].index_fill(0, p, 0.0).max()) for n, p in chosen(trainer).items()
    )
    assert lowest >= left_out * (1 - 1e-4)


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "The cat", "completion": " sat on the mat."}', '{"text": "The cat sat."}'],
)
def test_fisher_text_may_be_other_than_the_training_data(configure: Configure, line: str) -> None:
    config = configure(method="fisher")
    other = config.data.with_name("text.jsonl")
    other.write_text(line)
    own, foreign = (
        chosen(Trainer(configure(method="fisher", fisher_data=f))) for f in (None, other)
    )
    assert not all(torch.equal(own[name], foreign[name]) for name in own)


def draws() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(h * w, generator=generator) for n, (h, w) in SHAPES.items()}


def support(config: TrainConfig, base: Base) -> dict[str, torch.Tensor]:
    return first_support(config, base, shapes=dict(base.spec.shapes), texts=[])


def chosen(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: flat_positions(layer) for name, layer in trainer.model.layers.items()}


def dense_fisher(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the mean squared gradient of every weight, by autograd on the weights themselves."""
    base, total = trainer.base, {}
    weights = [layer.weight.requires_grad_() for layer in base.layers.values()]
    for example in trainer.examples:
        loss: Any = trainer.model(**collate([example], pad=0)).loss
        for name, gradient in zip(base.layers, torch.autograd.grad(loss, weights), strict=True):
            total[name] = total.get(name, 0) + gradient.flatten().square() / len(trainer.examples)
    return total
