"""PEFT SHiRA (arXiv 2406.13175): rows and columns beside their values, equally many by rank.

Every layer holds r·(R + C) entries with one r for the whole adapter, as many as a LoRA of rank r
would. Who has fewer fills up with zeros at (0, 0), which PEFT adds without effect.
"""

import json
import math
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import Adapter, SparseDelta
from spieldose_trainer.errors import ConversionError
from spieldose_trainer.interop.entries import (
    POSITION_DTYPES,
    check_dtype,
    checked_delta,
    target_shape,
)
from spieldose_trainer.interop.peft_adapter import (
    CHAT_TEMPLATE,
    CONFIG,
    PREFIX,
    SAFETENSORS,
    PeftAdapter,
)


def read(source: PeftAdapter, base: BaseSpec) -> dict[str, SparseDelta]:
    """Return an adapter's deltas by module, without padding; raises ConversionError.

    Format as of peft 0.21.2.
    """
    rank = source.setting("r", int)
    modules = {}
    for module, (indices, values) in source.by_module("shira_indices", "shira_weight").items():
        height, width = target_shape(base, module)
        expected = rank * (height + width)
        if values.shape != (expected,) or indices.shape != (2, expected):
            raise ConversionError(
                f"{module}: expected r·(R + C) = {rank}·({height} + {width}) = {expected} values "
                f"and [2, {expected}] indices, got {list(values.shape)} and {list(indices.shape)}"
            )
        rows, columns = _whole(module, indices)
        outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
        if bool(outside.any()):
            first = indices[:, outside][:, 0].long().tolist()
            raise ConversionError(
                f"{module}: expected positions inside {[height, width]}, got {first}"
            )
        padding = (rows == 0) & (columns == 0) & (values == 0)
        positions = (rows * width + columns)[~padding]
        modules[module] = checked_delta(module, positions, values[~padding], shape=(height, width))
    return modules


def _whole(module: str, indices: torch.Tensor) -> torch.Tensor:
    """Return indices as int64; PEFT on Windows saves them as float32. Raises ConversionError."""
    check_dtype(f"{module}: indices", indices, (*POSITION_DTYPES, torch.float32))
    whole = indices.long()
    broken = indices[whole != indices]
    if broken.numel():
        raise ConversionError(f"{module}: expected whole indices, got {float(broken[0])}")
    return whole


def smallest_rank(adapter: Adapter) -> int:
    """Return the smallest r at which every layer's entries fit; raises ConversionError.

    PEFT refuses an r whose r·(R + C) exceeds some layer's R·C weights.
    """
    filled = {module: delta for module, delta in adapter.modules.items() if delta.nnz}
    if not filled:
        raise ConversionError("expected a delta with at least one entry, got none")
    needed = {module: math.ceil(d.nnz / sum(d.shape)) for module, d in filled.items()}
    fullest = max(needed, key=needed.__getitem__)
    rank = needed[fullest]
    for module, delta in filled.items():
        height, width = delta.shape
        if rank * (height + width) > height * width:
            raise ConversionError(
                f"SHiRA pads every layer to r·(R + C) entries: expected that {rank}, the r of "
                f"{fullest}, fits {module} of shape {[height, width]}, got "
                f"{rank * (height + width)} entries for {height * width} weights"
            )
    return rank


def write(adapter: Adapter, directory: Path, *, base: str) -> None:
    """Write a directory that PEFT loads as a SHiRA adapter of `base`.

    The directory appears complete or not at all. Raises ConversionError if it exists with anything
    in it, if the layers' densities differ too much for one r, and where nothing can be written.
    """
    rank = smallest_rank(adapter)
    modules = {module: delta for module, delta in adapter.modules.items() if delta.nnz}
    tensors = {}
    for module, delta in modules.items():
        indices, values = _padded(delta, rank * sum(delta.shape))
        tensors[f"{PREFIX}{module}.shira_indices"] = indices
        tensors[f"{PREFIX}{module}.shira_weight"] = values
    directory = directory.absolute()  # "." has no name
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        config = _config(list(modules), rank=rank, base=base)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if adapter.info.chat_template:
            (temporary / CHAT_TEMPLATE).write_text(adapter.info.chat_template, encoding="utf-8")
        safetensors.torch.save_file(tensors, temporary / SAFETENSORS, {"format": "pt"})
        os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"expected to write a new directory {directory}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _padded(delta: SparseDelta, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows and columns, [2, count] int32, and values, [count] float32."""
    indices = torch.zeros(2, count, dtype=torch.int32)
    values = torch.zeros(count)
    indices[0, : delta.nnz] = delta.rows().int()
    indices[1, : delta.nnz] = delta.columns.int()
    values[: delta.nnz] = delta.values.float()
    return indices, values


def _config(modules: list[str], *, rank: int, base: str) -> dict[str, object]:
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        # a name PEFT has no mask for: at "random" it draws one for every layer before it reads the
        # indices, and transformers' load_adapter (5.23), which ignores them, computes with it
        "mask_type": "spieldose",
        "random_seed": None,
        "target_modules": modules,
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
