"""From a run's settings to its parts: the first support, the updater and the selector."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch

from spieldose_kernels.base import Base, dense_weight
from spieldose_kernels.delta import Adapter
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.data import Example, collate
from spieldose_trainer.groups import BUDGET
from spieldose_trainer.model import SparseModel
from spieldose_trainer.ranks import mean_over_ranks
from spieldose_trainer.selectors import scores
from spieldose_trainer.selectors.accumulated_gradients import AccumulatedGradients
from spieldose_trainer.selectors.first_support import (
    Positions,
    best_support,
    random_support,
    row_support,
)
from spieldose_trainer.selectors.largest_deltas import LargestDeltas
from spieldose_trainer.selectors.momentum import MomentumApproximation
from spieldose_trainer.selectors.principal import Principal
from spieldose_trainer.selectors.schedule import RefreshSchedule, ReselectionSchedule
from spieldose_trainer.selectors.selector import Selector
from spieldose_trainer.updaters.adamw import SparseAdamW
from spieldose_trainer.updaters.compressed_adam import CompressedAdam
from spieldose_trainer.updaters.sm3 import SM3
from spieldose_trainer.updaters.updater import Updater
from spieldose_trainer.updaters.zeroth_order import ZerothOrder


def first_support(
    config: TrainConfig,
    base: Base,
    *,
    shapes: dict[str, tuple[int, int]],
    texts: Sequence[Example],
    over: Adapter | None = None,
) -> Positions:
    """Return the support a run starts with; `texts` are what the Fisher scores are taken on."""
    density = config.choice.density
    found: Iterable[tuple[str, torch.Tensor]]

    def weight(name: str) -> torch.Tensor:
        return _played_weight(base, name, over=over)

    match config.choice.selector:
        case "row-topk":
            return row_support(shapes, density, weights=weight)
        case "magnitude":
            found = ((name, scores.magnitude(weight(name))) for name in shapes)
        case "principal":
            found = ((name, scores.principal(weight(name), rank=config.rank)) for name in shapes)
        case "fisher":
            found = _fisher(SparseModel(base, _nothing(shapes), over=over), texts)
        case _:
            return random_support(shapes, density, seed=config.seed)
    return best_support(shapes, density, allocation=config.allocation, scores=found)


def make_updater(config: TrainConfig, layers: dict[str, TrainableDelta]) -> Updater:
    """Return what moves the values of these layers."""
    lr, decay = config.choice.learning_rate, config.weight_decay
    match config.choice.updater:
        case "adamw":
            values = [layer.values for layer in layers.values()]
            return SparseAdamW(values, lr=lr, weight_decay=decay)
        case "sm3":
            return SM3(layers.values(), lr=lr, weight_decay=decay)
        case "zeroth-order":
            return ZerothOrder(
                layers.values(),
                lr=lr,
                epsilon=config.epsilon,
                weight_decay=decay,
                seed=config.seed,
            )
        case "compressed-adam":
            return CompressedAdam(layers, lr=lr, compression=config.compression, weight_decay=decay)


def make_selector(
    config: TrainConfig,
    model: SparseModel,
    *,
    updater: Updater,
    updates: int,
    over: Adapter | None = None,
) -> Selector:
    """Return what changes the model's support in a run of so many updates."""
    choice = config.choice
    match choice.selector:
        case "gradients" | "momentum":
            schedule = ReselectionSchedule(
                every=choice.reselect_every,
                steps=config.selection_steps,
                first_rate=config.first_rate,
                initial_rate=config.initial_rate,
                decay=config.rate_schedule,
                total=updates,
            )
            least_changed = config.drop == "least-changed"
            if choice.selector == "momentum":
                return MomentumApproximation(
                    model.layers,
                    updater=updater,
                    schedule=schedule,
                    since_reselection=least_changed,
                )
            return AccumulatedGradients(
                model.layers,
                updater=updater,
                schedule=schedule,
                since_reselection=least_changed,
                passes=config.accumulation,
                seed_momentum=config.seed_momentum,
                normalised=config.growth == "correlation",
            )
        case "principal":
            return Principal(
                model.layers,
                updater=updater,
                schedule=RefreshSchedule(every=choice.reselect_every, total=updates),
                scores=partial(_moved_principal, model, over=over, rank=config.rank),
            )
        case "largest":
            assert isinstance(updater, CompressedAdam)  # as `check_pair` made sure
            return LargestDeltas(model.layers, updater=updater)
        case _:
            return Selector()


def _moved_principal(
    model: SparseModel, name: str, *, over: Adapter | None, rank: int
) -> torch.Tensor:
    weight = _played_weight(model.base, name, over=over)
    return scores.principal(weight + model.layers[name].dense(), rank=rank)


def _played_weight(base: Base, name: str, *, over: Adapter | None) -> torch.Tensor:
    """Return a layer's weight with what lies over it already, [R, C] float32."""
    weight = dense_weight(base.layers[name], torch.float32)
    if over is None or name not in over.modules:
        return weight
    return weight + over.modules[name].dense(torch.float32).to(weight.device)


def _nothing(shapes: Iterable[str]) -> Positions:
    """Return supports of layers that are watched, not moved."""
    return dict.fromkeys(shapes, torch.empty(0, dtype=torch.int64))


def _fisher(model: SparseModel, texts: Sequence[Example]) -> Iterator[tuple[str, torch.Tensor]]:
    def loss(text: Example) -> torch.Tensor:
        batch = {name: t.to(model.model.device) for name, t in collate([text], pad=0).items()}
        value: torch.Tensor = model(**batch).loss
        return value

    losses = [partial(loss, text) for text in texts]
    for name, score in scores.fisher(model.layers, losses, budget=BUDGET):
        yield name, mean_over_ranks(score)  # equal, but for sums in another order on a GPU
