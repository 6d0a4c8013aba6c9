"""SFT of the SpIEL authors' fork of PEFT (AlanAnsell/peft): flat positions beside their values."""

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import SparseDelta
from spieldose_trainer.errors import ConversionError
from spieldose_trainer.interop.entries import checked_delta, target_shape
from spieldose_trainer.interop.peft_adapter import PeftAdapter


def read(source: PeftAdapter, base: BaseSpec) -> dict[str, SparseDelta]:
    """Return an adapter's deltas by module; raises ConversionError.

    `num_deltas` names every module and its number of entries, and is held against the tensors.
    """
    parts = source.by_module("sft_delta.indices", "sft_delta.values")
    declared = source.setting("num_deltas", dict)
    if missing := sorted(declared.keys() - parts.keys()):
        raise ConversionError(f"{source.directory}: expected a delta of {missing[0]!r}, got none")
    modules = {}
    for module, (indices, values) in parts.items():
        shape = target_shape(base, module)
        if values.numel() != declared.get(module):
            raise ConversionError(
                f"{module}: expected num_deltas = {declared.get(module)} values, "
                f"got {values.numel()}"
            )
        modules[module] = checked_delta(module, indices, values, shape=shape)
    return modules
