"""The tensors of a checkpoint, read from its shards a piece at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from spieldose_kernels.base_spec import weight_files
from spieldose_kernels.errors import BaseError
from spieldose_trainer.errors import ConversionError

TILE_WEIGHTS: Final = 1 << 20  # 4 MB in float32
BITS: Final = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}  # of dtypes that are not quantised


class CheckpointTensors:
    """Know where every tensor of a checkpoint lies, its shape and its dtype.

    Raises ConversionError without safetensors files, or for broken ones.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors spells them
        self._files: dict[str, Path] = {}
        try:
            files = weight_files(directory)
        except BaseError as error:
            raise ConversionError(error) from error
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  # it is no mapping
                        stored = file.get_slice(name)
                        self.shapes[name] = tuple(stored.get_shape())
                        self.dtypes[name] = stored.get_dtype()
                        self._files[name] = path
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{path}: expected safetensors, got: {error}") from error

    def check_weights(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ConversionError unless these modules' weights are there, and not quantised."""
        for module, shape in shapes.items():
            name = f"{module}.weight"
            found, dtype = self.shapes.get(name), self.dtypes.get(name)
            if found != shape or dtype not in BITS:
                got = "none" if found is None else f"{list(found)} in {dtype}"
                raise ConversionError(
                    f"{self.directory}: expected {name} of shape {list(shape)}, not quantised, "
                    f"got {got}"
                )

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
