"""A delta that mends an NF4 base: without training, its layers come nearer to what they were."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from spieldose_kernels.base import (
    dense_weight,
    load_base,
    load_tokenizer,
    pick_compute_dtype,
    pick_device,
)
from spieldose_kernels.checkpoint import find_checkpoint, read_config, target_shapes
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_trainer import delta_path
from spieldose_trainer.data import Example, read_examples
from spieldose_trainer.files import check_out
from spieldose_trainer.limits import Limits
from spieldose_trainer.repair.config import METHOD, RepairConfig
from spieldose_trainer.repair.grams import input_grams
from spieldose_trainer.repair.sparse_rows import sparse_rows
from spieldose_trainer.residual import original_weights
from spieldose_trainer.selectors.first_support import entries
from spieldose_trainer.shared_name import shared_name


@dataclass(frozen=True, slots=True)
class Energies:
    """Hold what a layer says, and how far it is off: squared norms over the examples' tokens."""

    output: float  # ‖W·X‖²
    before: float  # ‖(W − NF4(W))·X‖²
    after: float  # ‖(W − NF4(W) − Δ)·X‖²


@dataclass(frozen=True, slots=True)
class Repair:
    """Hold a delta and what it mends."""

    adapter: Adapter
    energies: Mapping[str, Energies]  # by module


def repair(config: RepairConfig) -> Repair:
    """Write a delta file that brings the layers of an NF4 base nearer to what they were.

    Entries are chosen, equally many in every row, and their values solved for what the layers are
    fed when the base reads the examples. What is wrong with settings or data is said before the
    base is loaded. Raises BaseError, DataError, ConfigError and ConversionError.
    """
    check_out(config.out, reads={"base": config.base, "data": config.data})
    directory = find_checkpoint(config.base)
    shapes = target_shapes(directory)
    originals = original_weights(directory, shapes)
    examples = _read(config, directory)
    device = pick_device(config.device)
    base = load_base(
        config.base,
        device=device,
        compute_dtype=pick_compute_dtype(config.compute_dtype, device),
        fused=False,
    )
    modules, energies = {}, {}
    grams = input_grams(base, list(shapes), examples)
    for name, gram in tqdm(grams, total=len(shapes), unit="layer", disable=None, leave=False):
        if not bool(gram.any()):  # text does not reach it: an image tower's
            continue
        height, width = shapes[name]
        weight = torch.cat(list(originals.tiles(f"{name}.weight"))).view(height, width).to(device)
        error = weight - dense_weight(base.layers[name], torch.float32)
        columns, values = sparse_rows(error, gram, count=entries(config.density, width))
        left = error.scatter_add(1, columns, -values)
        energies[name] = Energies(*(_energy(rows, gram) for rows in (weight, error, left)))
        first = torch.arange(height, device=device)[:, None] * width
        modules[name] = SparseDelta.from_flat(
            (first + columns).flatten().cpu(), values.flatten().cpu(), shape=shapes[name]
        )
    weights = sum(map(math.prod, shapes.values()))
    info = AdapterInfo(
        base_model=shared_name(base.spec.name),
        base_fingerprint=base.spec.fingerprint,
        method=METHOD,
        density=sum(delta.nnz for delta in modules.values()) / weights,
        description=config.description,
        settings={"density": str(config.density), "samples": str(len(examples))},
    )
    adapter = Adapter(info, modules)
    delta_path.write(config.out, adapter)
    return Repair(adapter, energies)


def _read(config: RepairConfig, directory: Path) -> Sequence[Example]:
    examples = read_examples(
        config.data,
        load_tokenizer(directory),
        max_length=config.max_length,
        too_long="truncate",
        limits=Limits.of(read_config(directory)),
        or_text=True,
    )
    return examples[: config.samples]


def _energy(rows: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ‖rows·X‖², where gram = X·Xᵀ."""
    return float(((rows @ gram) * rows).sum(dtype=torch.float64))
