"""SpIEL-MA: entries join the support by the momentum that SM3's accumulators tell of them."""

import torch

from spieldose_trainer.selectors.outer_product import largest_products
from spieldose_trainer.selectors.spiel import Spiel
from spieldose_trainer.support import flat_positions
from spieldose_trainer.updaters.sm3 import SM3


class MomentumApproximation(Spiel):
    """Drop the entries that changed least and grow where row·column is largest (arXiv 2401.16405).

    SM3 keeps one accumulator per row and per column of the active entries; their product stands for
    the momentum of every other weight, so that no gradient outside the support is ever needed.
    """

    updater: SM3

    @torch.no_grad()
    def reselect(self, name: str, update: int) -> int:
        """Exchange a layer's entries; what was just dropped may grow again, untouched."""
        layer = self.layers[name]
        active = flat_positions(layer)
        order = self.changes(name).argsort(stable=True)
        count = int(active.numel() * self.schedule.rate(update))
        survivors = active[order[count:]].sort().values
        row, column = self.updater.accumulators(layer.values)
        best = largest_products(row, column, count=count, excluded=survivors)
        grown = best[~torch.isin(best, active)]
        # rows and columns without a gradient so far have nothing to offer: fewer are dropped then
        leaving = order[:count][~torch.isin(active[order[:count]], best)][: grown.numel()]
        keep = torch.ones_like(active, dtype=torch.bool)
        keep[leaving] = False
        self.exchange(name, keep=keep, grown=grown, update=update)
        return grown.numel()
