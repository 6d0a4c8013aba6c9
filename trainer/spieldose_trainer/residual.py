"""What rounding a base to 4 bits took from the weights of a support: what values may start from."""

from collections.abc import Mapping
from pathlib import Path

import torch

from spieldose_kernels.base import dense_weight
from spieldose_trainer.errors import ConfigError, ConversionError
from spieldose_trainer.interop.checkpoint_tensors import CheckpointTensors
from spieldose_trainer.model import SparseModel
from spieldose_trainer.support import flat_positions


def original_weights(directory: Path, shapes: Mapping[str, tuple[int, int]]) -> CheckpointTensors:
    """Return a checkpoint that holds these layers' weights as they were before quantisation.

    Raises ConfigError if it does not.
    """
    tensors = CheckpointTensors(directory)
    try:
        tensors.check_weights(shapes)
    except ConversionError as error:
        raise ConfigError(f"{error}: they tell what NF4 rounds away") from error
    return tensors


@torch.no_grad()
def start_from_residual(model: SparseModel, originals: CheckpointTensors) -> None:
    """Set a model's values to W − NF4(W) at its support.

    The rest of the layer stays in 4 bits: weights in the support play at full precision (after
    arXiv 2406.02913, which keeps its sensitive weights so).
    """
    for name, layer in model.layers.items():
        positions = flat_positions(layer)
        played = dense_weight(model.base.layers[name], torch.float32).flatten()[positions]
        exact = _entries(originals, f"{name}.weight", positions.cpu())
        layer.values.copy_(exact.to(played.device) - played)


def _entries(tensors: CheckpointTensors, name: str, positions: torch.Tensor) -> torch.Tensor:
    """Return a tensor's entries at ascending flat positions, [Z] float32."""
    found, first = [], 0
    for tile in tensors.tiles(name):
        bounds = torch.tensor([first, first + tile.numel()])
        start, end = torch.searchsorted(positions, bounds).tolist()
        found.append(tile[positions[start:end] - first])
        first += tile.numel()
    return torch.cat(found)
