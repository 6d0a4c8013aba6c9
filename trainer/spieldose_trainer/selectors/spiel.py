"""What SpIEL-AG and SpIEL-MA share: when entries are replaced, how many, and which leave."""

from collections.abc import Mapping
from typing import Any

import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.selectors.schedule import ReselectionSchedule
from spieldose_trainer.selectors.selector import Reselector
from spieldose_trainer.updaters.updater import Updater


class Spiel(Reselector):
    """Drop the entries that changed least, at a rate that falls over the run (arXiv 2401.16405).

    How much an entry changed is its |δ|; with `since_reselection` it is how far it moved since the
    last reselection, the other reading of the paper's words.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableDelta],
        *,
        updater: Updater,
        schedule: ReselectionSchedule,
        since_reselection: bool = False,
    ) -> None:
        super().__init__(layers, updater=updater, schedule=schedule)
        self.schedule = schedule
        self._anchors: dict[str, torch.Tensor] | None = None  # [Z] values at the last reselection
        if since_reselection:
            self._anchors = {name: layer.values.detach().clone() for name, layer in layers.items()}

    def changes(self, name: str) -> torch.Tensor:
        """Return how much each entry of a layer changed, [Z]."""
        values = self.layers[name].values.detach()
        return values.abs() if self._anchors is None else (values - self._anchors[name]).abs()

    def exchange(
        self, name: str, *, keep: torch.Tensor, grown: torch.Tensor, update: int
    ) -> torch.Tensor:
        """Replace a layer's entries outside `keep` by zeros at `grown`; return a mask of those."""
        newcomers = super().exchange(name, keep=keep, grown=grown, update=update)
        if self._anchors is not None:
            self._anchors[name] = self.layers[name].values.detach().clone()
        return newcomers

    def state_dict(self) -> dict[str, Any]:
        """Return the values at the last reselection, if they are needed."""
        return {} if self._anchors is None else {"anchors": self._anchors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        if self._anchors is not None:
            self._anchors = dict(state["anchors"])
