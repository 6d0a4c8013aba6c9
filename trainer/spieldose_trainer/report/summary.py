"""A finished run in numbers, which both forms of its report are made from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from spieldose_kernels.delta import Adapter
from spieldose_trainer.memory import MemoryTable
from spieldose_trainer.module_kind import ModuleKind
from spieldose_trainer.report.magnitudes import Magnitudes
from spieldose_trainer.run_log import RunLog
from spieldose_trainer.short_kinds import short_kinds


@dataclass(frozen=True, slots=True)
class ModuleSummary:
    """Hold what one module's delta amounts to."""

    place: ModuleKind
    shape: tuple[int, int]  # (R, C)
    entries: int
    norm: float  # Frobenius norm of Δ


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Hold a finished run in numbers."""

    adapter: Adapter
    log: RunLog
    settings: Mapping[str, str]
    processes: int  # that shared every batch
    memory: MemoryTable
    modules: Mapping[str, ModuleSummary]
    ages: list[float] | None  # share of the final support by the reselection that brought it in
    magnitudes: Mapping[str, Magnitudes]  # by module kind

    @property
    def all_magnitudes(self) -> Magnitudes:
        """Return the magnitudes of all kinds together."""
        parts = list(self.magnitudes.values())
        counts = torch.stack([part.counts for part in parts]).sum(0)
        return Magnitudes(counts, sum(part.zeros for part in parts))

    @property
    def seconds(self) -> float:
        """Return the wall time of all updates; start-up, evaluation and checkpoints left out."""
        return math.fsum(update.seconds for update in self.log.updates)

    @property
    def tokens(self) -> int:
        """Return the tokens processed by all updates."""
        return sum(update.tokens for update in self.log.updates)


def summarise(
    adapter: Adapter,
    log: RunLog,
    *,
    born: Mapping[str, torch.Tensor],
    settings: Mapping[str, str],
    processes: int,
    memory: MemoryTable,
) -> Summary:
    """Work out a report's numbers; `born` is by module [Z], aligned with the adapter's entries."""
    where = short_kinds(adapter.modules)
    modules = {
        name: ModuleSummary(where[name], delta.shape, delta.nnz, float(delta.values.float().norm()))
        for name, delta in adapter.modules.items()
    }
    kinds = dict.fromkeys(place.kind for place in where.values())
    magnitudes = {
        kind: Magnitudes.of(
            delta.values for name, delta in adapter.modules.items() if where[name].kind == kind
        )
        for kind in kinds
    }
    return Summary(
        adapter=adapter,
        log=log,
        settings=settings,
        processes=processes,
        memory=memory,
        modules=modules,
        ages=_ages(adapter, born),
        magnitudes=magnitudes,
    )


def _ages(adapter: Adapter, born: Mapping[str, torch.Tensor]) -> list[float] | None:
    for name, delta in adapter.modules.items():
        assert born[name].shape == (delta.nnz,), f"{name}: one reselection per entry"
    counts = [torch.bincount(born[name].long().cpu()) for name in adapter.modules]
    total = torch.zeros(max(part.numel() for part in counts), dtype=torch.int64)
    for part in counts:
        total[: part.numel()] += part
    shares: list[float] = (total / total.sum()).tolist()
    return shares if len(shares) > 1 else None  # one: the support never changed
