"""Plan a run from its settings and the base's configuration alone, before anything is loaded."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from transformers import PretrainedConfig

from spieldose_kernels.base import pick_compute_dtype, pick_device
from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.checkpoint import find_checkpoint, read_config, target_shapes
from spieldose_kernels.delta import Adapter
from spieldose_trainer import delta_path
from spieldose_trainer.config import Choice, TrainConfig
from spieldose_trainer.files import check_files
from spieldose_trainer.groups import BUDGET
from spieldose_trainer.limits import Limits
from spieldose_trainer.memory import tensor_bytes
from spieldose_trainer.modules import select_modules
from spieldose_trainer.plan import KindPlan, Plan
from spieldose_trainer.process_memory import resident
from spieldose_trainer.rehearsal import BlankDelta, rehearse
from spieldose_trainer.selectors.first_support import entries
from spieldose_trainer.short_kinds import short_kinds
from spieldose_trainer.sizes import (
    base_bytes,
    candidate_bytes,
    file_bytes,
    gathered_bytes,
    moment_bytes,
)

Sizes = Mapping[str, tuple[int, int, int]]  # R, C and Z by layer

# what the process holds over what lives: glibc keeps freed blocks. Measured over 5 updates of
# SmolLM2-135M in NF4 and float32, 8 × 103 tokens: spiel-ag 1.38 (1.27 at 4 × 256, 1.52 with
# gradient checkpointing), sgc 1.28, zo 1.47 and 1.63
CPU_RETENTION = 1.4


def make_plan(config: TrainConfig) -> Plan:
    """Plan a run; reads the base's configuration only.

    Raises BaseError, ConfigError, DataError or DeltaError.

    Every example is taken to have `max_length` tokens that all count, or as many as the base has
    positions, which bounds what the data can take; every layer to have the same density. What a
    selector needs of one layer at a time is left out.
    """
    over = check_files(config)
    choice, directory = config.choice, find_checkpoint(config.base, weights=False)
    shapes = target_shapes(directory)
    if config.over is not None and over is not None:  # the base's weights may not be here
        delta_path.read(config.over, BaseSpec(config.base, over.info.base_fingerprint, shapes))
    sizes = _sizes(config, select_modules(shapes, config.modules))
    device = pick_device(config.device)
    dtype = pick_compute_dtype(config.compute_dtype, device)
    base = read_config(directory)
    with torch.device("meta"):
        deltas = [BlankDelta(*size) for size in sizes.values()]
    value = tensor_bytes(delta.values for delta in deltas)
    gradient = 0 if choice.updater == "zeroth-order" else value
    step = _pass_bytes(config, base, sizes, batch_size=config.batch_size, backward=gradient > 0)
    on_cpu = device.type == "cpu"
    return Plan(
        kinds=_kinds(sizes),
        updater=choice.updater,
        batch_size=config.batch_size,
        length=Limits.of(base).length(config.max_length),
        allocation="global" if config.allocates_globally else "layer",
        file=sum(
            file_bytes(name, *size, dtype=getattr(torch, config.value_dtype))
            for name, size in _together(sizes, over).items()
        ),
        base=_frozen_bytes(over)
        + base_bytes(base, shapes, dtype=dtype, quantised=config.quantised),
        value=value,
        position=tensor_bytes(list(delta.buffers()) for delta in deltas),
        gradient=gradient,
        moments=sum(
            moment_bytes(choice.updater, *size, compression=config.compression)
            for size in sizes.values()
        ),
        selection=sum(_selection_bytes(config, *size) for size in sizes.values()),
        step=None if step is None else step - gradient,
        before=_fisher_bytes(config, base, sizes) if choice.selector == "fisher" else 0,
        libraries=resident() if on_cpu else None,
        retention=CPU_RETENTION if on_cpu else 1.0,
    )


def _together(sizes: Sizes, over: Adapter | None) -> Sizes:
    """Return R, C and Z by layer of what is trained and what lies beneath; few entries are both."""
    found = dict(sizes)
    for name, delta in ({} if over is None else over.modules).items():
        entries = found[name][2] if name in found else 0
        found[name] = (*delta.shape, min(entries + delta.nnz, math.prod(delta.shape)))
    return found


def _frozen_bytes(over: Adapter | None) -> int:
    """Return what an adapter takes that lies beneath a run: see `FrozenDelta`."""
    deltas = () if over is None else over.modules.values()
    return sum(2 * (4 + 4) * delta.nnz + 4 * (sum(delta.shape) + 2) for delta in deltas)


def _sizes(config: TrainConfig, shapes: Mapping[str, tuple[int, int]]) -> Sizes:
    """Return R, C and Z by layer; Z is an equal share where layers compete for their entries."""
    if not config.allocates_globally:
        return {name: (*shape, _count(config.choice, *shape)) for name, shape in shapes.items()}
    total, before, sizes = sum(math.prod(shape) for shape in shapes.values()), 0, {}
    whole = entries(config.choice.density, total)
    for name, shape in shapes.items():
        after = before + math.prod(shape)
        sizes[name] = (*shape, whole * after // total - whole * before // total)
        before = after
    return sizes


def _count(choice: Choice, height: int, width: int) -> int:
    if choice.selector == "row-topk":
        return height * entries(choice.density, width)
    return entries(choice.density, height * width)


def _pass_bytes(
    config: TrainConfig,
    base: PretrainedConfig,
    sizes: Sizes,
    *,
    batch_size: int,
    backward: bool,
) -> int | None:
    device = pick_device(config.device)
    dtype = pick_compute_dtype(config.compute_dtype, device)
    held = rehearse(
        base,
        sizes,
        batch_size=batch_size,
        length=Limits.of(base).length(config.max_length),
        dtype=dtype,
        backward=backward,
        checkpointing=config.gradient_checkpointing,
        on_cpu=device.type == "cpu",
    )
    if held is None or not config.quantised:
        return held
    # the layer that computes is there in full, besides in NF4
    return held + max(height * width for height, width, _ in sizes.values()) * dtype.itemsize


def _selection_bytes(config: TrainConfig, height: int, width: int, count: int) -> int:
    match config.choice.selector:
        case "gradients":
            return candidate_bytes(
                height,
                width,
                count,
                passes=config.accumulation,
                normalised=config.growth == "correlation",
            )
        case "largest":
            return gathered_bytes(height, width, config.compression)
        case _:
            return 0


def _fisher_bytes(config: TrainConfig, base: PretrainedConfig, sizes: Sizes) -> int:
    """Return what Fisher scores take: squared gradients, and a pass over one sample at a time."""
    squares = 4 * min(BUDGET, sum(height * width for height, width, _ in sizes.values()))
    return squares + (_pass_bytes(config, base, sizes, batch_size=1, backward=True) or 0)


def _kinds(sizes: Sizes) -> tuple[KindPlan, ...]:
    where = short_kinds(sizes)
    groups = defaultdict(list)
    for name, (height, width, count) in sizes.items():
        groups[where[name].kind, (height, width)].append(count)
    return tuple(
        KindPlan(kind=kind, shape=shape, layers=len(counts), entries=sum(counts))
        for (kind, shape), counts in groups.items()
    )
