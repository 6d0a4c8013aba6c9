"""Adapters from one file format into another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.checkpoint import checkpoint_spec
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_trainer import delta_path
from spieldose_trainer.errors import ConversionError
from spieldose_trainer.files import check_out, read_template
from spieldose_trainer.interop import sft, shira, super_tuning, wave_ft
from spieldose_trainer.interop.config import ConvertConfig
from spieldose_trainer.interop.peft_adapter import CHAT_TEMPLATE, PeftAdapter, read_peft
from spieldose_trainer.mending import mends_rounding
from spieldose_trainer.shared_name import shared_name

Reader = Callable[[PeftAdapter, BaseSpec], dict[str, SparseDelta]]


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """Name a method of PEFT's and say how its files are read."""

    name: str  # the `method` of the delta file
    read: Reader


METHODS: Final = {  # by peft_type
    "SHIRA": PeftMethod("shira", shira.read),
    "SUPERTUNING": PeftMethod("super-tuning", super_tuning.read),
    "WAVEFT": PeftMethod("waveft", wave_ft.read),
    "SFT": PeftMethod("sft", sft.read),
}


def convert(config: ConvertConfig) -> Adapter:
    """Read an adapter, write it in the other format, and return it.

    Raises ConversionError, ConfigError, BaseError, or DeltaError if SOURCE is a delta file that is
    not one or belongs to another base.
    """
    if config.target == "delta":
        check_out(config.out, reads={"source": config.source, "base": config.base})
    if config.source.is_dir():
        source = read_peft(config.source)  # refused before the base is hashed
        method = _method(source)
        base = checkpoint_spec(config.base)
        adapter = imported(source, base, method=method, description=config.description)
    else:
        adapter = delta_path.read(config.source, checkpoint_spec(config.base))
    if config.target == "shira":
        if mends_rounding(adapter.info):
            raise ConversionError(
                f"{config.source}: expected deltas for weights as they were saved, which PEFT "
                "plays, got some that make up for what NF4 rounds away"
            )
        shira.write(adapter, config.out, base=config.base)
    else:
        delta_path.write(config.out, adapter)
    return adapter


def imported(
    source: PeftAdapter, base: BaseSpec, *, method: PeftMethod, description: str
) -> Adapter:
    """Return a PEFT adapter's deltas with where they come from; raises ConversionError."""
    modules, template = method.read(source, base), source.directory / CHAT_TEMPLATE
    entries = sum(delta.nnz for delta in modules.values())
    weights = sum(height * width for height, width in base.shapes.values())
    info = AdapterInfo(
        base_model=shared_name(base.name),
        base_fingerprint=base.fingerprint,
        method=method.name,
        density=entries / weights,
        description=description,
        settings={key: str(value) for key, value in source.config.items() if _tells(value)},
        chat_template=read_template(template if template.exists() else None),
    )
    return Adapter(info, modules)


def _method(source: PeftAdapter) -> PeftMethod:
    name = source.setting("peft_type", str)
    if name not in METHODS:
        raise ConversionError(
            f"{source.directory}: expected peft_type {', '.join(METHODS)}, got {name}"
        )
    return METHODS[name]


def _tells(value: Any) -> bool:
    """Say whether a setting is worth keeping: SFT's `num_deltas` names every module."""
    return value is not None and value != [] and not isinstance(value, dict)
