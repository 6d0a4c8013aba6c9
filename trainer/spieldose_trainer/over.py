"""The adapter that a run builds on, and what that and the run make together."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from spieldose_kernels.base_spec import BaseSpec, fingerprint_checkpoint
from spieldose_kernels.delta import Adapter
from spieldose_trainer import delta_path
from spieldose_trainer.config import TrainConfig
from spieldose_trainer.errors import ConfigError
from spieldose_trainer.mending import MENDS, NF4, mends_rounding


def read_over(
    config: TrainConfig, directory: Path, shapes: Mapping[str, tuple[int, int]]
) -> Adapter | None:
    """Return the adapter that a run builds on, None without one; `shapes` are all the base's.

    Raises DeltaError, and ConfigError for a repair where nothing was rounded.
    """
    if config.over is None:
        return None
    spec = BaseSpec(config.base, fingerprint_checkpoint(directory), shapes)
    over = delta_path.read(config.over, spec)
    if mends_rounding(over.info) and not config.quantised:
        raise ConfigError(f"over: {config.over} mends a quantised base, expected quantised with it")
    return over


def together(trained: Adapter, over: Adapter | None, *, dtype: torch.dtype) -> Adapter:
    """Return what both play as one adapter, its values summed in float32 and rounded once."""
    modules = dict(trained.modules)
    for name, frozen in ({} if over is None else over.modules).items():
        modules[name] = frozen.plus(modules[name]) if name in modules else frozen
    modules = {
        name: replace(delta, values=delta.values.to(dtype)) for name, delta in modules.items()
    }
    weights = sum(math.prod(delta.shape) for delta in modules.values())
    density = sum(delta.nnz for delta in modules.values()) / weights
    settings = dict(trained.info.settings)
    if over is not None and mends_rounding(over.info):
        settings[MENDS] = NF4
    return Adapter(replace(trained.info, density=density, settings=settings), modules)
