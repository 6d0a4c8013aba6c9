"""A toy model whose every number can be followed: two plain layers with trainable deltas."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch

from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.schedule import ReselectionSchedule
from spieldose_trainer.selector import AccumulatedGradients, flat_positions
from spieldose_trainer.updater import SparseAdamW

Product = Callable[[str, torch.Tensor], torch.Tensor]  # a layer's output by name and input

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
        self.updater = SparseAdamW(
            [layer.values for layer in self.layers.values()], lr=1e-2, weight_decay=weight_decay
        )
        self.schedule = ReselectionSchedule(
            every=every, steps=steps, initial_rate=0.4, decay=decay, total=total
        )
        self.selector = AccumulatedGradients(
            self.layers, self.shapes, updater=self.updater, schedule=self.schedule
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
        return flat_positions(self.layers[name], self.shapes[name])

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
    return TrainableDelta(support.row_starts, support.columns.int())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: at toy size a second one only waits, and spins while it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    """Make a toy run; keyword arguments as in `Toy`."""
    return Toy


@pytest.fixture
def make_trainable() -> Callable[..., TrainableDelta]:
    """Make one trainable layer from flat positions and a shape."""
    return trainable
