"""PEFT WaveFT without wavelets: values alone, at positions that follow from a seed."""

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import SparseDelta
from spieldose_trainer.errors import ConversionError
from spieldose_trainer.interop.entries import checked_delta, target_shape
from spieldose_trainer.interop.peft_adapter import CONFIG, PeftAdapter


def read(source: PeftAdapter, base: BaseSpec) -> dict[str, SparseDelta]:
    """Return an adapter's deltas by module: `scaling` times its values, in float32.

    Positions are the first Z of torch's random permutation of R·C, drawn on the CPU from the same
    seed in every layer. Format as of peft 0.21.2. Raises ConversionError.
    """
    if source.config.get("use_idwt") is not False:
        raise ConversionError(
            f"{source.directory / CONFIG}: expected use_idwt false, got "
            f"{source.config.get('use_idwt')!r}: wavelets spread over the whole weight"
        )
    seed = source.setting("random_loc_seed", int)
    if not 0 <= seed < 1 << 63:
        raise ConversionError(
            f"{source.directory / CONFIG}: expected a random_loc_seed below 2^63, got {seed}"
        )
    scaling = source.setting("scaling", (int, float))
    if not abs(scaling) <= torch.finfo(torch.float32).max:
        raise ConversionError(
            f"{source.directory / CONFIG}: expected a scaling that float32 holds, got another"
        )
    parts = source.by_module("waveft_spectrum")
    longest: dict[int, int] = {}  # entries by number of weights
    for module, (values,) in parts.items():
        height, width = target_shape(base, module)
        weights = height * width
        if values.numel() > weights:
            raise ConversionError(
                f"{module}: expected at most {weights} values, got {values.numel()}"
            )
        longest[weights] = max(values.numel(), longest.get(weights, 0))
    positions = {weights: _positions(weights, seed, count) for weights, count in longest.items()}
    modules = {}
    for module, (values,) in parts.items():
        height, width = base.shapes[module]
        places = positions[height * width][: values.numel()]
        modules[module] = checked_delta(
            module, places, values.float() * scaling, shape=(height, width)
        )
    return modules


def _positions(weights: int, seed: int, count: int) -> torch.Tensor:
    whole = torch.randperm(weights, generator=torch.Generator().manual_seed(seed))
    return whole[:count].clone()  # a view would keep 8 bytes a weight
