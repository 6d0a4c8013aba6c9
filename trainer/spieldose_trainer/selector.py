"""SpIEL-AG: which weights are in the support, decided by accumulated gradients."""

from collections.abc import Mapping

import torch

from spieldose_kernels.delta import SparseDelta
from spieldose_kernels.linear import TrainableDelta
from spieldose_trainer.candidates import Candidates
from spieldose_trainer.schedule import ReselectionSchedule
from spieldose_trainer.updater import SparseAdamW

# candidates per support entry: at 1 the first update alone would decide the first reselection
CANDIDATE_FACTOR = 2


class AccumulatedGradients:
    """Drop the entries that changed least and grow where gradients are largest (arXiv 2401.16405).

    The run tells it when an update begins and ends; it watches the layers' backward passes during
    selection phases only, and exchanges support entries in place at the end of each.
    """

    def __init__(
        self,
        layers: Mapping[str, TrainableDelta],
        shapes: Mapping[str, tuple[int, int]],
        *,
        updater: SparseAdamW,
        schedule: ReselectionSchedule,
    ) -> None:
        self.layers = layers
        self.shapes = shapes
        self.updater = updater
        self.schedule = schedule
        self.candidates: dict[str, Candidates] = {}

    def begin_update(self, update: int) -> None:
        """Watch the backward passes of this update if it belongs to a selection phase."""
        if not self.schedule.in_phase(update):
            return
        if self.schedule.opens_phase(update):
            self.candidates = {
                name: Candidates(self.shapes[name], count=CANDIDATE_FACTOR * layer.values.numel())
                for name, layer in self.layers.items()
            }
        for name, watcher in self.candidates.items():
            self.layers[name].probe = watcher.observe

    def end_update(self, update: int) -> int:
        """Close the update, after the values moved; return how many positions were replaced."""
        if not self.candidates:
            return 0
        for name, watcher in self.candidates.items():
            self.layers[name].probe = None
            watcher.finish_update()
        if not self.schedule.closes_phase(update):
            return 0
        rate = self.schedule.rate(update)
        replaced = sum(self._reselect(name, rate) for name in self.layers)
        self.candidates = {}
        return replaced

    @torch.no_grad()
    def _reselect(self, name: str, rate: float) -> int:
        layer, watcher, shape = self.layers[name], self.candidates[name], self.shapes[name]
        active = flat_positions(layer, shape)
        keep, grow = choose_exchange(
            active,
            layer.values.detach(),
            watcher.positions,
            watcher.total,
            count=int(active.numel() * rate),
        )
        grown = watcher.positions[grow]
        exchange(layer, self.updater, shape=shape, keep=keep, grown=grown)
        where = torch.isin(flat_positions(layer, shape), grown)
        mean = watcher.total[grow] / watcher.samples
        self.updater.seed(
            layer.values,
            where,
            mean=mean,
            mean_square=watcher.total_square[grow] / watcher.samples,
            age=watcher.samples,
        )
        return grown.numel()

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the running phase's sums, empty outside a phase."""
        return {name: watcher.state_dict() for name, watcher in self.candidates.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, torch.Tensor]]) -> None:
        """Go on in the middle of a phase."""
        self.candidates = {}
        for name, saved in state.items():
            count = CANDIDATE_FACTOR * self.layers[name].values.numel()
            self.candidates[name] = Candidates(self.shapes[name], count=count)
            self.candidates[name].load_state_dict(saved)


def choose_exchange(
    active: torch.Tensor,
    values: torch.Tensor,
    candidates: torch.Tensor,
    gradients: torch.Tensor,
    *,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (keep, grow): a mask over `active` [Z], and ascending indices into `candidates` [M].

    The `count` smallest |value| are dropped, the `count` largest |gradient| outside the survivors
    grown; a position in both sets is kept untouched. Positions are flat and ascending.
    """
    keep = torch.ones(active.numel(), dtype=torch.bool, device=active.device)
    keep[values.abs().topk(count, largest=False).indices] = False
    score = gradients.abs().masked_fill(torch.isin(candidates, active[keep]), -1.0)
    grow = score.topk(count).indices.sort().values
    both = torch.isin(candidates[grow], active[~keep])
    keep |= torch.isin(active, candidates[grow][both])
    return keep, grow[~both]


def flat_positions(layer: TrainableDelta, shape: tuple[int, int]) -> torch.Tensor:
    """Return a layer's support as flat row-major positions, [Z] int64 ascending."""
    delta = SparseDelta(layer.row_starts, layer.columns, layer.values.detach(), shape[1])
    return delta.rows() * shape[1] + layer.columns.long()


def exchange(
    layer: TrainableDelta,
    updater: SparseAdamW,
    *,
    shape: tuple[int, int],
    keep: torch.Tensor,
    grown: torch.Tensor,
) -> None:
    """Replace the entries outside `keep` by zeros at `grown`; survivors carry value and moments."""
    positions = torch.cat([flat_positions(layer, shape)[keep], grown])
    order = torch.argsort(positions)
    for tensor in (layer.values.data, *updater.moments(layer.values).values()):
        moved = torch.cat([tensor[keep], tensor.new_zeros(grown.numel())])
        tensor.copy_(moved[order])
    support = SparseDelta.from_flat(positions[order], layer.values.data, shape=shape)
    layer.row_starts.copy_(support.row_starts)
    layer.columns.copy_(support.columns)
