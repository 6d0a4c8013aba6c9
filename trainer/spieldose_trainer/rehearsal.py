"""One update of a run on tensors that have shapes but no data: what it would hold in memory."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from spieldose_kernels.linear import DeltaLinear, TrainableDelta, replace
from spieldose_kernels.support_product import support_product
from spieldose_trainer.live_bytes import LiveBytes


def rehearse(
    config: PretrainedConfig,
    supports: Mapping[str, tuple[int, int, int]],
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    backward: bool,
    checkpointing: bool,
    on_cpu: bool,
) -> int | None:
    """Return the most bytes a forward pass, and its backward pass, hold beside model and deltas.

    Runs the model's own code with Z entries over each of `supports`, (R, C, Z) by name. That covers
    activations, temporaries and the values' gradients, with fused attention over a batch that has
    padding, and logits as if every token counted. None for a model that cannot run without data, as
    some mixtures of experts.
    """
    try:
        with _quiet(), FakeTensorMode():
            over = {name: BlankDelta(*size, on_cpu=on_cpu) for name, size in supports.items()}
            model = _model(config, over, dtype=dtype, checkpointing=checkpointing)
            ids = torch.zeros(batch_size, length, dtype=torch.int64)
            live = LiveBytes([*model.parameters(), *model.buffers(), ids])
            with live, torch.set_grad_enabled(backward):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                if backward:
                    loss.backward()
    except RuntimeError:
        return None
    return live.peak


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # reports what is raised anyway
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class BlankDelta(TrainableDelta):
    """Stand for a layer's R, C and Z alone: its positions mean nothing and its data is never read.

    It makes the tensors that the products of training make, on the CPU or on CUDA.
    """

    def __init__(self, height: int, width: int, entries: int, *, on_cpu: bool = True) -> None:
        row_starts = torch.zeros(height + 1, dtype=torch.int32)
        super().__init__(row_starts, torch.zeros(entries, dtype=torch.int32), width=width)
        self._on_cpu = on_cpu

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return what has the shape of y + Δ·x, differentiable in all three."""
        if self._on_cpu:
            apply: Callable[..., torch.Tensor] = _BlankProduct.apply
            return apply(y, x, self.values)
        delta = support_product(
            x.reshape(-1, x.shape[-1]),
            self.values,
            row_starts=self.row_starts,
            columns=self.columns,
        )
        return (y + delta.reshape(y.shape)).to(y.dtype)


class _BlankProduct(torch.autograd.Function):
    """Make what the CPU's own product makes; that one would read the data."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, values)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, values = ctx.saved_tensors
        return upstream[0], torch.empty_like(x), torch.empty_like(values)


def _model(
    config: PretrainedConfig,
    deltas: Mapping[str, TrainableDelta],
    *,
    dtype: torch.dtype,
    checkpointing: bool,
) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    layers: Any = model.get_submodule
    replace(model, {name: DeltaLinear(layers(name), delta) for name, delta in deltas.items()})
    return model
