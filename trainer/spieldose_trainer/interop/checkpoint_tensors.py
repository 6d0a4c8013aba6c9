"""The tensors of a checkpoint, read from its shards a piece at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from spieldose_trainer.errors import ConversionError

TILE_WEIGHTS: Final = 1 << 20  # 4 MB in float32


class CheckpointTensors:
    """Know where every tensor of a checkpoint lies, and its shape; raises ConversionError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # it is no mapping
                        self.shapes[name] = tuple(file.get_slice(name).get_shape())
                        self._files[name] = path
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{path}: expected safetensors, got: {error}") from error
        if not self.shapes:
            raise ConversionError(f"expected *.safetensors weights in {directory}, got none")

    def tiles(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor in order, flat float32 pieces of whole rows of its first dimension."""
        shape = self.shapes[name]
        with safe_open(self._files[name], framework="pt") as file:
            if not shape:
                yield file.get_tensor(name).float().flatten()
                return
            stored = file.get_slice(name)
            row = max(1, torch.Size(shape[1:]).numel())
            rows = max(1, TILE_WEIGHTS // row)
            for first in range(0, shape[0], rows):
                yield stored[first : first + rows].float().flatten()
