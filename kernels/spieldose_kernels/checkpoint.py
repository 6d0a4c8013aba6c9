"""A base model's checkpoint as it lies on disk: where it is, and what it is before it is loaded."""

import os
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.quantizers.auto import AutoHfQuantizer

from spieldose_kernels.base_spec import BaseSpec, fingerprint_checkpoint
from spieldose_kernels.errors import BaseError


def find_checkpoint(name: str, *, weights: bool = True) -> Path:
    """Return the directory of a model, fetched first if `name` is a hub name; raises BaseError.

    Without `weights` only the small files are fetched.
    """
    if os.path.isdir(name):  # unlike Path's own, False for names that are too long
        return Path(name)
    repository = hub_name(name)
    try:
        wanted = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
        again = ["consolidated*", "*/*.safetensors"]  # the same weights in other formats
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=again))
    except Exception as error:  # whatever a network can do, and huggingface_hub lets through
        raise BaseError(
            f"expected a model directory or hub name, got {name!r}: {first_line(error)}"
        ) from error


def hub_name(name: str) -> str:
    """Return what is no directory, if it may be a model's name on the hub; raises BaseError."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BaseError(f"expected a model directory or hub name, got {name!r}") from error
    return name


def checkpoint_spec(name: str) -> BaseSpec:
    """Return what `load_base` would say of this model, without loading its weights.

    Reads the weights once, to hash them. Raises BaseError.
    """
    directory = find_checkpoint(name)
    return BaseSpec(name, fingerprint_checkpoint(directory), target_shapes(directory))


def target_shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """Return (R, C) of every target layer, by module name and in the model's order.

    Builds the model on the meta device and lets transformers choose the layers to quantise, as it
    does when it loads. Reads nothing but the configuration. Raises BaseError.
    """
    try:
        config = read_config(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        stored = getattr(config, "quantization_config", None)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        wanted = nf4 if stored is None else stored
        quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=stored is not None)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    except BaseError:
        raise
    except Exception as error:  # a configuration may make transformers stumble over anything
        raise BaseError(
            f"expected a causal language model at {directory}, got: {first_line(error)}"
        ) from error
    layers = nf4_layers(model, name=str(directory))
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def nf4_layers(model: nn.Module, *, name: str) -> dict[str, Linear4bit]:
    """Return a quantised model's target layers by module name; raises BaseError if not all NF4."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Linear4bit)}
    # a checkpoint may say that it is quantised, and hold plain weights
    kinds = {str(getattr(layer.weight, "quant_type", "nothing")) for layer in layers.values()}
    if kinds != {"nf4"}:
        found = ", ".join(sorted(kinds)) or "no 4-bit layer"
        raise BaseError(f"{name}: expected linear layers quantised to nf4, got {found}")
    return layers


def read_config(directory: Path) -> PretrainedConfig:
    """Return a model's configuration; code that comes with it never runs. Raises BaseError."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a configuration may make transformers stumble over anything
        raise BaseError(
            f"expected a causal language model at {directory}, got: {first_line(error)}"
        ) from error
    return config


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
