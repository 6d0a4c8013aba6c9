"""What every selector answers to; by itself, a support that stays as it is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.support import exchange
from spieldose_trainer.updaters.updater import Updater


class Selector:
    """Leave the support as it is.

    A run tells its selector when an update begins and when it has moved the values, counted from 1.
    """

    lost: float | None = None  # share of the deltas' norm that this update's change of support cost
    lost_over_run: float | None = None  # and all changes together, of a selector that counts it

    def begin_update(self, update: int) -> None:
        """Prepare for the backward passes of an update."""

    def scale_update(self, factor: float) -> None:
        """Scale what was seen of the running update's gradient as clipping scaled the values'."""

    def end_update(self, update: int) -> int:
        """Change the support if it is time; return how many entries were replaced."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, between two updates: plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""


class Reselections(Protocol):
    """Say after which updates the support changes."""

    def due(self, update: int) -> bool:
        """Say whether the support changes after this update."""
        ...

    def number(self, update: int) -> int:
        """Return which reselection that is, counted from 1."""
        ...


class Reselector(Selector, ABC):
    """Exchange entries of every layer whenever that is due; subclasses say which."""

    def __init__(
        self,
        layers: Mapping[str, TrainableDelta],
        *,
        updater: Updater,
        schedule: Reselections,
    ) -> None:
        self.layers = layers
        self.updater = updater
        self._reselections = schedule

    def end_update(self, update: int) -> int:
        """Change the support if it is due; return how many entries were replaced."""
        self.lost = None
        if not self._reselections.due(update):
            return 0
        before = self._norm()
        replaced = sum(self.reselect(name, update) for name in self.layers)
        self.lost = (max(0.0, 1 - self._norm() / before) if before else 0.0) ** 0.5
        return replaced

    @abstractmethod
    def reselect(self, name: str, update: int) -> int:
        """Change one layer's support; return how many entries were replaced."""

    def exchange(
        self, name: str, *, keep: torch.Tensor, grown: torch.Tensor, update: int
    ) -> torch.Tensor:
        """Replace a layer's entries outside `keep` by zeros at `grown`; return a mask of those."""
        layer = self.layers[name]
        return exchange(
            layer,
            keep=keep,
            grown=grown,
            number=self._reselections.number(update),
            entries=self.updater.moments(layer.values).values(),
        )

    def _norm(self) -> float:
        """Return Σ δ²."""
        return sum(float(layer.values.detach().square().sum()) for layer in self.layers.values())
