"""The base model: any Hugging Face causal language model, in 4-bit NF4 or as it was saved."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spieldose_kernels.base_spec import BaseSpec, fingerprint_checkpoint, weight_files
from spieldose_kernels.checkpoint import (
    find_checkpoint,
    first_line,
    nf4_layers,
    read_config,
    target_shapes,
)
from spieldose_kernels.errors import BaseError


@dataclass(frozen=True, slots=True)
class Base:
    """Hold a frozen model, its tokenizer, and what deltas for it must match."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: BaseSpec
    layers: dict[str, nn.Linear]  # the target layers by module name; Linear4bit if quantised


def load_base(
    name: str,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    fused: bool,
    quantised: bool = True,
) -> Base:
    """Load a causal language model in NF4 with double quantisation, or as NF4 already saved so.

    `name` is a directory or a hub name. `fused` lets bitsandbytes repack weights for its fused CPU
    product, which rounds activations and block scales to bfloat16 and has no gradient: leave it off
    for training and wherever float32 must mean float32. With `quantised` off the layers keep their
    weights in `compute_dtype`. Raises BaseError.
    """
    directory = find_checkpoint(name)
    try:
        config = read_config(directory)
        stored = getattr(config, "quantization_config", None)
        if not quantised and stored is not None:
            raise BaseError(f"{name}: expected a base that is not quantised, got one that is")
        weight_files(directory)
        tokenizer = load_tokenizer(directory)
        arguments: dict[str, Any] = {}
        if quantised and stored is None:
            arguments["quantization_config"] = _nf4(compute_dtype)
        load: Any = AutoModelForCausalLM.from_pretrained
        model, found = load(
            directory,
            dtype=compute_dtype,
            device_map={"": device},
            output_loading_info=True,
            trust_remote_code=False,
            **arguments,
        )
    except BaseError:
        raise
    except Exception as error:  # a configuration may make transformers stumble over anything
        raise BaseError(
            f"expected a causal language model at {name}, got: {first_line(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers would play random numbers
        raise BaseError(f"{name}: expected weights for {missing[0]}, got none")
    layers = nf4_layers(model, name=name) if quantised else _plain_layers(name, model, directory)
    if quantised:
        for path, layer in layers.items():
            _check_shape(f"{name}: {path}", layer)
            layer.compute_dtype = compute_dtype
            layer.compute_type_is_set = True
            _correct_on_cpu(layer, fused=fused and compute_dtype == torch.bfloat16)
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    spec = BaseSpec(name, fingerprint_checkpoint(directory), shapes)
    return Base(model.eval().requires_grad_(False), tokenizer, spec, layers)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint. Raises BaseError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises no narrower type
        said = " ".join(str(error).split())  # a list, a line each
        raise BaseError(f"expected a tokenizer at {directory}, got: {said}") from error
    return tokenizer


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA when there is one. Raises BaseError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise BaseError("device: expected a CUDA device that PyTorch can use, got none")
    if name == "cuda":  # by its number: a thread that transformers loads on has its own current one
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; "auto" is bfloat16 where the hardware multiplies it."""
    if name == "auto":
        name = "bfloat16" if device.type != "cpu" or has_avx512bf16() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """Return a layer's weight, dequantised if need be, as a dense [R, C] tensor; not repacked."""
    if not isinstance(layer, Linear4bit):
        return layer.weight.detach().to(dtype)
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
        return nn.functional.linear(x, dense_weight(self, x.dtype), bias)


def _check_shape(name: str, layer: Linear4bit) -> None:
    """Raise BaseError for a weight of another shape, which transformers quantises all the same."""
    expected, got = (layer.out_features, layer.in_features), tuple(layer.weight.quant_state.shape)
    if got != expected:
        raise BaseError(f"{name}: expected a weight of shape {expected}, got {got}")


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


def _plain_layers(name: str, model: PreTrainedModel, directory: Path) -> dict[str, nn.Linear]:
    """Return the layers that would have been quantised."""
    layers = {path: model.get_submodule(path) for path in target_shapes(directory)}
    for path, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise BaseError(f"{name}: expected a linear layer {path}, got {type(layer).__name__}")
    return cast(dict[str, nn.Linear], layers)
