"""A PEFT adapter as it lies in its directory: settings, and tensors by module."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from spieldose_trainer.errors import ConversionError
from spieldose_trainer.text import is_text

CONFIG: Final = "adapter_config.json"
SAFETENSORS: Final = "adapter_model.safetensors"
PICKLE: Final = "adapter_model.bin"
CHAT_TEMPLATE: Final = "chat_template.jinja"  # as transformers saves a tokenizer's
PREFIX: Final = "base_model.model."  # what PEFT puts before every module name of the base
# what torch's restricted unpickler makes of bytes that are not its own
UNREADABLE: Final = (
    *(pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, TypeError),
    *(LookupError, AttributeError, AssertionError, ImportError, OverflowError, MemoryError),
)


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """Hold an adapter's settings and tensors."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]  # by name, without PEFT's prefix

    def setting(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Return a setting of this type; raises ConversionError if there is none."""
        value = self.config.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConversionError(f"{self.directory / CONFIG}: expected {name}, got {value!r}")
        return value

    def by_module(self, *parts: str) -> dict[str, list[torch.Tensor]]:
        """Return each module's tensors, in the order of `parts`.

        Raises ConversionError if a part is missing or there are other tensors, such as the dense
        ones that PEFT keeps for `modules_to_save`.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            part = next((part for part in parts if name.endswith(f".{part}")), None)
            if part is None:
                raise ConversionError(
                    f"{self.directory}: expected only {' and '.join(parts)} of linear layers, "
                    f"got {name!r}"
                )
            if tensor.is_complex():
                raise ConversionError(f"{name}: expected real numbers, got {tensor.dtype}")
            found.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
        for module, tensors in found.items():
            for part in parts:
                if part not in tensors:
                    raise ConversionError(f"{module}: expected {part}, got none")
        return {module: [tensors[part] for part in parts] for module, tensors in found.items()}


def read_peft(directory: Path) -> PeftAdapter:
    """Read a PEFT adapter's directory; a pickle is read as tensors only. Raises ConversionError."""
    config = _read_config(directory / CONFIG)
    tensors = {}
    for name, tensor in _read_weights(directory).items():
        if not name.startswith(PREFIX):
            raise ConversionError(
                f"{directory}: expected tensor names that begin with {PREFIX}, got {name!r}"
            )
        tensors[name.removeprefix(PREFIX)] = tensor
    if not tensors:
        raise ConversionError(f"{directory}: expected at least one tensor, got none")
    return PeftAdapter(directory, config, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"expected PEFT's settings in {path}, got: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: expected a JSON object, got {type(config).__name__}")
    if not is_text(json.dumps(config, ensure_ascii=False)):
        raise ConversionError(f"{path}: expected Unicode text, got half of a character")
    return config


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    if (path := directory / SAFETENSORS).exists():
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise ConversionError(f"{path}: expected safetensors, got: {error}") from error
    if (path := directory / PICKLE).exists():
        return _read_pickle(path)
    raise ConversionError(f"{directory}: expected {SAFETENSORS} or {PICKLE}, got neither")


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a pickle of named tensors with torch's restricted unpickler, which runs no code."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # torch's own words advise to load it unrestricted
        raise ConversionError(
            f"{path}: expected a pickle of tensors only, got one that torch's restricted unpickler "
            f"refuses ({type(error).__name__})"
        ) from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: expected named tensors, got {type(found).__name__}")
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise ConversionError(
                f"{path}: expected named tensors, got {type(tensor).__name__} at {name!r}"
            )
        if kind := _kind(tensor):
            raise ConversionError(f"{path}: expected dense tensors, got a {kind} one at {name!r}")
    return found


def _kind(tensor: torch.Tensor) -> str:
    """Return what a tensor is other than a list of numbers in memory, "" for nothing."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "" if tensor.device.type == "cpu" else tensor.device.type
