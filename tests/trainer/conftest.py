"""A toy model whose every number can be followed: two plain layers with trainable deltas."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from spieldose_kernels.base import Base, load_base
from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer import trainer
from spieldose_trainer.model import SparseModel
from spieldose_trainer.selectors.accumulated_gradients import AccumulatedGradients
from spieldose_trainer.selectors.first_support import random_support
from spieldose_trainer.selectors.momentum import MomentumApproximation
from spieldose_trainer.selectors.schedule import ReselectionSchedule
from spieldose_trainer.support import flat_positions
from spieldose_trainer.updaters.adamw import SparseAdamW
from spieldose_trainer.updaters.sm3 import SM3

from .configuration import Configure, configuration

Product = Callable[[str, torch.Tensor], torch.Tensor]  # a layer's output by name and input

HERE = str(Path(__file__).parent)
TOKENS = 6


class Toy:
    """Hold two chained layers, the selector and updater over them, and data for every update."""

    shapes: ClassVar = {"first": (12, 10), "second": (8, 12)}

    def __init__(
        self,
        *,
        density: float = 0.2,
        accumulation: int = 1,
        weight_decay: float = 0.0,
        every: int = 20,
        steps: int = 5,
        total: int = 60,
        decay: str = "linear",
        method: str = "spiel-ag",
        since_reselection: bool = False,
        seed_momentum: bool = True,
        normalised: bool = False,
        first_rate: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.accumulation = accumulation
        self.weights, self.layers = {}, {}
        for name, (height, width) in self.shapes.items():
            self.weights[name] = torch.randn(height, width, generator=generator).double()
            positions = torch.randperm(height * width, generator=generator)
            self.layers[name] = trainable(
                positions[: int(density * height * width)], shape=(height, width)
            )
        self.schedule = ReselectionSchedule(
            every=every,
            steps=steps,
            initial_rate=0.4,
            decay=decay,
            total=total,
            first_rate=first_rate,
        )
        self.since_reselection = since_reselection
        self.seed_momentum = seed_momentum
        self.normalised = normalised
        layers, settings = self.layers, {"lr": 1e-2, "weight_decay": weight_decay}
        self.updater = (
            SparseAdamW([layer.values for layer in layers.values()], **settings)
            if method == "spiel-ag"
            else SM3(layers.values(), **settings)
        )
        kind: Any = (
            partial(
                AccumulatedGradients,
                passes=accumulation,
                seed_momentum=seed_momentum,
                normalised=normalised,
            )
            if method == "spiel-ag"
            else MomentumApproximation
        )
        self.selector = kind(
            layers,
            updater=self.updater,
            schedule=self.schedule,
            since_reselection=since_reselection,
        )

    def batches(self, update: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield input and target of every forward pass of an update, [TOKENS, ...] float64."""
        generator = torch.Generator().manual_seed(1000 + update)
        x = torch.randn(TOKENS, self.shapes["first"][1], generator=generator)
        target = 3 * torch.randn(TOKENS, self.shapes["second"][0], generator=generator)
        yield from zip(
            x.double().chunk(self.accumulation),
            target.double().chunk(self.accumulation),
            strict=True,
        )

    def loss(self, product: Product, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return one forward pass's share of the update's loss."""
        y = product("second", product("first", x).tanh())
        return (y - target).square().mean() / self.accumulation

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return W·x + Δ·x in float32."""
        return self.layers[name].add_to(x @ self.weights[name].to(x.dtype).t(), x)

    def update(self, number: int) -> int:
        """Make one whole update; return how many positions were replaced."""
        self.selector.begin_update(number)
        self.updater.zero_grad()
        for x, target in self.batches(number):
            self.loss(self.product, x.float(), target.float()).backward()
        self.updater.step()
        return self.selector.end_update(number)

    def positions(self, name: str) -> torch.Tensor:
        """Return a layer's support, flat and ascending."""
        return flat_positions(self.layers[name])

    def dense(self, name: str, entries: torch.Tensor) -> torch.Tensor:
        """Spread numbers at a layer's support, its values or moments, over its whole shape."""
        height, width = self.shapes[name]
        out = entries.new_zeros(height * width)
        out[self.positions(name)] = entries.detach()
        return out.view(height, width)

    def moment(self, layer: str, name: str) -> torch.Tensor:
        """Return one of the updater's moments, spread over the layer's whole shape."""
        return self.dense(layer, self.updater.moments(self.layers[layer].values)[name])


def trainable(positions: torch.Tensor, *, shape: tuple[int, int]) -> TrainableDelta:
    """Make a trainable delta with zeros at flat positions."""
    support = SparseDelta.from_flat(positions, torch.zeros(positions.numel()), shape=shape)
    return TrainableDelta(support.row_starts, support.columns.int(), width=shape[1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: at toy size a second one only waits, and spins while it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def processes() -> Iterator[BaseContext]:
    """Start processes that find the trainer imported, and these tests' modules by their names."""
    multiprocessing.set_forkserver_preload(["spieldose_trainer.trainer"])  # 9 s each time
    sys.path.insert(0, HERE)
    yield multiprocessing.get_context("forkserver")
    sys.path.remove(HERE)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run's report away: its plots take longer than all the rest of a short run."""
    monkeypatch.setattr(trainer, "write_report", lambda *_, **__: None)


@pytest.fixture
def plain(tiny_directory: Path) -> Base:
    """The tiny model as it was saved."""
    return load_base(
        str(tiny_directory),
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        fused=False,
        quantised=False,
    )


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    """Make a toy run; keyword arguments as in `Toy`."""
    return Toy


@pytest.fixture
def configure(tiny_directory: Path, tmp_path: Path) -> Configure:
    """Make the configuration of a short run."""
    return configuration(tiny_directory, tmp_path)


@pytest.fixture
def make_model() -> Callable[..., SparseModel]:
    """Make a model with a random support from a base and a density."""

    def make(base: Base, *, density: float) -> SparseModel:
        return SparseModel(base, random_support(base.spec.shapes, density, seed=0))

    return make


@pytest.fixture
def make_trainable() -> Callable[..., TrainableDelta]:
    """Make one trainable layer from flat positions and a shape."""
    return trainable
