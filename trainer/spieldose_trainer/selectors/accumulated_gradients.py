"""SpIEL-AG: entries join the support by their accumulated gradients."""

from collections.abc import Mapping
from typing import Any

import torch

from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.selectors.candidates import Candidates
from spieldose_trainer.selectors.schedule import ReselectionSchedule
from spieldose_trainer.selectors.spiel import Spiel
from spieldose_trainer.support import flat_positions
from spieldose_trainer.updaters.updater import Updater

# candidates per support entry: at 1 the first update alone would decide the first reselection
CANDIDATE_FACTOR = 2
# running sums per candidate, and in small layers altogether, while an update of several forward
# passes is not complete
SPARE = 4
FLOOR = 1 << 16


class AccumulatedGradients(Spiel):
    """Drop the entries that changed least and grow where gradients are largest (arXiv 2401.16405).

    It watches the layers' backward passes during selection phases only.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableDelta],
        *,
        updater: Updater,
        schedule: ReselectionSchedule,
        since_reselection: bool = False,
        passes: int = 1,
        seed_momentum: bool = True,
        normalised: bool = False,
    ) -> None:
        """Take `passes`, the forward passes of an update, besides what all variants take.

        Without `seed_momentum` newcomers take over the spread of their gradients, not the mean,
        which is biased: it chose them. If `normalised`, gradients are compared after division by
        the norms of their inputs and output gradients: rows and columns that are large all over
        do not take the whole support.
        """
        super().__init__(
            layers, updater=updater, schedule=schedule, since_reselection=since_reselection
        )
        self.candidates: dict[str, Candidates] = {}  # empty outside a phase
        self._several = passes > 1
        self._seed_momentum = seed_momentum
        self._normalised = normalised

    def begin_update(self, update: int) -> None:
        """Watch the backward passes of this update if it belongs to a selection phase."""
        if not self.schedule.in_phase(update):
            return
        if self.schedule.opens_phase(update):
            self.candidates = {name: self._candidates(name) for name in self.layers}
        for name, watcher in self.candidates.items():
            self.layers[name].probe = watcher.observe

    def scale_update(self, factor: float) -> None:
        """Scale the candidates' gradients of the running update: they become seeds of moments."""
        for watcher in self.candidates.values():
            watcher.scale_update(factor)

    def end_update(self, update: int) -> int:
        """Close the update, after the values moved; return how many entries were replaced."""
        for name, watcher in self.candidates.items():
            self.layers[name].probe = None
            watcher.finish_update()
        replaced = super().end_update(update)
        if self.schedule.due(update):
            self.candidates = {}
        return replaced

    @torch.no_grad()
    def reselect(self, name: str, update: int) -> int:
        """Exchange a layer's entries, and start the newcomers' moments from the phase's means."""
        layer, watcher = self.layers[name], self.candidates[name]
        active = flat_positions(layer)
        keep, grow = choose_exchange(
            active,
            self.changes(name),
            watcher.positions,
            watcher.scores(),
            count=int(active.numel() * self.schedule.rate(update)),
        )
        grown = watcher.positions[grow]
        newcomers = self.exchange(name, keep=keep, grown=grown, update=update)
        counts = watcher.counts()[grow]
        mean = watcher.total[grow] / counts
        self.updater.seed(
            layer.values,
            newcomers,
            mean=mean if self._seed_momentum else torch.zeros_like(mean),
            mean_square=watcher.total_square[grow] / counts,
            age=counts,
        )
        return grown.numel()

    def state_dict(self) -> dict[str, Any]:
        """Return the running phase's sums too."""
        sums = {name: watcher.state_dict() for name, watcher in self.candidates.items()}
        return super().state_dict() | {"candidates": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of a phase."""
        super().load_state_dict(state)
        self.candidates = {name: self._candidates(name) for name in state["candidates"]}
        for name, watcher in self.candidates.items():
            watcher.load_state_dict(state["candidates"][name])

    def _candidates(self, name: str) -> Candidates:
        layer = self.layers[name]
        count = CANDIDATE_FACTOR * layer.values.numel()
        return Candidates(
            layer.shape,
            count=count,
            room=max(SPARE * count, FLOOR) if self._several else count,
            normalised=self._normalised,
            device=layer.values.device,
        )


def choose_exchange(
    active: torch.Tensor,
    changes: torch.Tensor,
    candidates: torch.Tensor,
    scores: torch.Tensor,
    *,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (keep, grow): a mask over `active` [Z], and ascending indices into `candidates` [M].

    The `count` smallest |change| are dropped, the `count` largest |score| outside the survivors
    grown; a position in both sets is kept untouched. Where fewer candidates have a gradient, fewer
    are exchanged. Positions are flat and ascending.
    """
    dropped = changes.abs().topk(count, largest=False).indices
    keep = torch.ones(active.numel(), dtype=torch.bool, device=active.device)
    keep[dropped] = False
    score = scores.abs().masked_fill(torch.isin(candidates, active[keep]), -1.0)
    free = int((score > 0).sum())
    grow = score.topk(min(count, free)).indices.sort().values
    both = torch.isin(candidates[grow], active[dropped])
    keep |= torch.isin(active, candidates[grow][both])
    leaving = dropped[~keep[dropped]]
    keep[leaving[int((~both).sum()) :]] = True
    return keep, grow[~both]
