"""PEFT Super-Tuning (arXiv 2607.09287): flat positions, unsorted, beside their values."""

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import SparseDelta
from spieldose_trainer.errors import ConversionError
from spieldose_trainer.interop.entries import checked_delta, target_shape
from spieldose_trainer.interop.peft_adapter import PeftAdapter


def read(source: PeftAdapter, base: BaseSpec) -> dict[str, SparseDelta]:
    """Return an adapter's deltas by module.

    Every layer holds int(R·C·(1 − sparsity)) entries: the file tells no shape, another number
    betrays another base. Format as of peft 0.21.2. Raises ConversionError.
    """
    if (rank := source.config.get("r")) is not None:
        raise ConversionError(
            f"{source.directory}: expected sparse values alone, got a low-rank part too (r={rank})"
        )
    if not any(name.endswith(".supertuning_indices") for name in source.tensors):
        raise ConversionError(
            f"{source.directory}: expected supertuning_indices, got none; load the adapter in PEFT "
            "and save it with save_precomputed_indices=True"
        )
    sparsity = source.setting("sparsity", (int, float))
    if not 0 <= sparsity <= 1:
        raise ConversionError(
            f"{source.directory}: expected a sparsity from 0 to 1, got {sparsity}"
        )
    modules = {}
    parts = source.by_module("supertuning_indices", "supertuning_values")
    for module, (indices, values) in parts.items():
        height, width = target_shape(base, module)
        expected = int(height * width * (1 - sparsity))
        if values.numel() != expected:
            raise ConversionError(
                f"{module}: expected {expected} values of shape {[height, width]} "
                f"at sparsity {sparsity}, got {values.numel()}"
            )
        modules[module] = checked_delta(module, indices, values, shape=(height, width))
    return modules
