"""The base model: any Hugging Face causal language model, resident in 4-bit NF4."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spieldose_kernels.base_spec import BaseSpec, fingerprint_checkpoint
from spieldose_kernels.checkpoint import find_checkpoint, first_line, nf4_layers
from spieldose_kernels.errors import BaseError


@dataclass(frozen=True, slots=True)
class Base:
    """Hold a frozen 4-bit model, its tokenizer, and what deltas for it must match."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: BaseSpec
    layers: dict[str, Linear4bit]  # the target layers by module name


def load_base(name: str, *, device: torch.device, compute_dtype: torch.dtype, fused: bool) -> Base:
    """Load a causal language model in NF4 with double quantisation, or as NF4 already saved so.

    `name` is a directory or a hub name. `fused` lets bitsandbytes repack weights for its fused CPU
    product, which rounds activations and block scales to bfloat16 and has no gradient: leave it off
    for training and wherever float32 must mean float32. Raises BaseError.
    """
    directory = find_checkpoint(name)
    try:
        config = AutoConfig.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        quantised = getattr(config, "quantization_config", None) is not None
        arguments: dict[str, Any] = (
            {} if quantised else {"quantization_config": _nf4(compute_dtype)}
        )
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=compute_dtype, device_map={"": device}, **arguments
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseError(
            f"expected a causal language model at {name}, got: {first_line(error)}"
        ) from error
    layers = nf4_layers(model, name=name)
    for layer in layers.values():
        layer.compute_dtype = compute_dtype
        layer.compute_type_is_set = True
        _correct_on_cpu(layer, fused=fused and compute_dtype == torch.bfloat16)
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    spec = BaseSpec(name, fingerprint_checkpoint(directory), shapes)
    return Base(model.eval().requires_grad_(False), tokenizer, spec, layers)


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; "auto" is bfloat16 where the hardware multiplies it."""
    if name == "auto":
        name = "bfloat16" if device.type != "cpu" or has_avx512bf16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dequantised(layer: Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's NF4 weight as a dense [R, C] tensor; the layer must not be repacked."""
    shape = layer.out_features, layer.in_features
    # as one row: quantisation blocks run on from row to row, bitsandbytes' CPU kernel ends them
    # with the row and misreads layers whose width is no multiple of the block (0.50.2)
    flat = copy.copy(layer.weight.quant_state)
    flat.shape = torch.Size([1, shape[0] * shape[1]])
    weight: torch.Tensor = dequantize_4bit(layer.weight.data, flat)
    return weight.reshape(shape).to(dtype)


class _DequantisedLinear(Linear4bit):  # type: ignore[misc]  # bitsandbytes is untyped here
    """Multiply by the dequantised weight, for layers that bitsandbytes' CPU kernels misread."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, dequantised(self, x.dtype), bias)


def _correct_on_cpu(layer: Linear4bit, *, fused: bool) -> None:
    """Keep a layer off CPU kernels that are wrong for it, and off the fused one unless asked."""
    on_cpu = layer.weight.device.type == "cpu"
    ragged = layer.in_features % layer.weight.blocksize != 0
    if on_cpu and ragged:
        layer.__class__ = _DequantisedLinear
    # the fused kernel asserts that it can pack 32 output rows at once
    if not fused or ragged or layer.out_features % 32 != 0:
        layer.support_avx512bf16_for_cpu = False


def _nf4(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
