"""One layer's entries as a foreign file lists them, checked and put into a delta's order."""

from typing import Final

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import SparseDelta
from spieldose_trainer.errors import ConversionError

POSITION_DTYPES: Final = (torch.int32, torch.int64)
VALUE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def target_shape(base: BaseSpec, module: str) -> tuple[int, int]:
    """Return (R, C) of a target layer; raises ConversionError if the base has none of that name."""
    if module not in base.shapes:
        raise ConversionError(f"expected a target module of {base.name}, got {module!r}")
    return base.shapes[module]


def checked_delta(
    module: str, positions: torch.Tensor, values: torch.Tensor, *, shape: tuple[int, int]
) -> SparseDelta:
    """Build a layer's delta from flat row-major positions, [Z] in any order, and values, [Z].

    float16 values become float32. Raises ConversionError unless the positions are different ones
    inside the layer and the values numbers.
    """
    _check_list(f"{module}: positions", positions, POSITION_DTYPES)
    _check_list(f"{module}: values", values, VALUE_DTYPES)
    if positions.numel() != values.numel():
        raise ConversionError(
            f"{module}: expected as many positions as values, "
            f"got {positions.numel()} and {values.numel()}"
        )
    positions = positions.long()
    weights = shape[0] * shape[1]
    outside = positions[(positions < 0) | (positions >= weights)]
    if outside.numel():
        raise ConversionError(
            f"{module}: expected positions below {weights} (shape {list(shape)}), "
            f"got {int(outside[0])}"
        )
    ordered = positions.sort().values
    repeated = ordered[1:][ordered.diff() == 0]
    if repeated.numel():
        row, column = divmod(int(repeated[0]), shape[1])
        raise ConversionError(
            f"{module}: expected every position once, got row {row} column {column} again"
        )
    if not bool(torch.isfinite(values).all()):
        raise ConversionError(f"{module}: expected finite values, got NaN or infinity")
    values = values.float() if values.dtype == torch.float16 else values
    return SparseDelta.from_flat(positions, values, shape=shape)


def _check_list(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dim() != 1:
        raise ConversionError(f"{name}: expected one dimension, got shape {list(tensor.shape)}")
    check_dtype(name, tensor, dtypes)


def check_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ConversionError unless a tensor has one of these dtypes."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConversionError(
            f"{name}: expected one of {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
