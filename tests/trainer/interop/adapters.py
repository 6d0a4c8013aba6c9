"""Adapters of other projects over the tiny model, and the models they are compared by."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from spieldose_kernels.delta import Adapter
from spieldose_kernels.linear import DeltaLinear, TrainableDelta, replace

PEFT_WARNS = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]
TARGETS = ["q_proj", "down_proj"]
TOKENS = torch.arange(40, 60)[None]
SFT_SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.up_proj": (160, 64)}


def dense_model(directory: Path) -> PreTrainedModel:
    """Load the checkpoint unquantised, in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def peft_model(directory: Path, config: peft.PeftConfig, *, seed: int = 1) -> peft.PeftModel:
    """Put a PEFT adapter with random values over the tiny model."""
    model = peft.get_peft_model(dense_model(directory), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def saved(model: peft.PeftModel, directory: Path) -> Path:
    """Save a PEFT adapter where `directory` says."""
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


@torch.no_grad()
def peft_deltas(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Return the dense [R, C] delta of every adapted layer, by PEFT's own account."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").to_dense()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def delta_model(directory: Path, adapter: Adapter) -> PreTrainedModel:
    """Put our own layers, y = W·x + Δ·x, over the unquantised model."""
    model = dense_model(directory)
    over = {}
    for name, delta in adapter.modules.items():
        trainable = TrainableDelta(delta.row_starts, delta.columns.int(), width=delta.width)
        trainable.values.data = delta.values.float()
        over[name] = DeltaLinear(model.get_submodule(name), trainable)  # type: ignore[arg-type]
    replace(model, over)
    return model


def write_sft(
    directory: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
    pickled: bool = True,
) -> dict[str, torch.Tensor]:
    """Write an adapter as the SpIEL authors' fork does; return its dense deltas by module.

    `tensors` replaces some, by their whole name, or leaves them out where None.
    """
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, torch.Tensor | None] = {}
    dense = {}
    for name, (height, width) in SFT_SHAPES.items():
        positions = torch.randperm(height * width, generator=generator)[:50].int()
        values = torch.randn(50, generator=generator)
        stored[f"base_model.model.{name}.sft_delta.indices"] = positions
        stored[f"base_model.model.{name}.sft_delta.values"] = values
        dense[name] = torch.zeros(height * width).index_put((positions.long(),), values)
        dense[name] = dense[name].view(height, width)
    kept = {k: v for k, v in {**stored, **(tensors or {})}.items() if v is not None}
    config = {
        "peft_type": "SFT",
        "base_model_name_or_path": "tiny",
        "num_deltas": dict.fromkeys(SFT_SHAPES, 50),
        "selection_algorithm": "rigl",
        "target_modules": None,
    }
    write_adapter(directory, {**config, **(settings or {})}, kept, pickled=pickled)
    return dense


def write_adapter(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    pickled: bool,
) -> None:
    """Write settings and tensors as PEFT does."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(dict(tensors), directory / "adapter_model.bin")
    else:
        save_file(dict(tensors), directory / "adapter_model.safetensors")
