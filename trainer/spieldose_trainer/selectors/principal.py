"""LIFT: the principal weights are in the support, those largest in a low-rank approximation."""

from collections.abc import Callable, Mapping

import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.selectors.schedule import RefreshSchedule
from spieldose_trainer.selectors.selector import Reselector
from spieldose_trainer.support import flat_positions
from spieldose_trainer.updaters.updater import Updater


class Principal(Reselector):
    """Keep the support on the principal weights of W + Δ as they move (arXiv 2506.00772).

    LIFT writes into W, which keeps what a weight learnt after it left the support; a delta of fixed
    size does not: what leaves is lost, and counted in `lost`. Survivors carry value and moments.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableDelta],
        *,
        updater: Updater,
        schedule: RefreshSchedule,
        scores: Callable[[str], torch.Tensor],
    ) -> None:
        """Take `scores`: a layer's present scores by name, [R·C], the larger the better."""
        super().__init__(layers, updater=updater, schedule=schedule)
        self._scores = scores

    @torch.no_grad()
    def reselect(self, name: str, update: int) -> int:
        """Move a layer's support to its present principal weights."""
        active = flat_positions(self.layers[name])
        best = self._scores(name).topk(active.numel()).indices.sort().values
        grown = best[~torch.isin(best, active)]
        self.exchange(name, keep=torch.isin(active, best), grown=grown, update=update)
        return grown.numel()
