"""What a delta must match: a base model's fingerprint and the shapes of its target layers."""

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spieldose_kernels.errors import BaseError

INDEX: Final = "model.safetensors.index.json"  # of a checkpoint in several files


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """Identify a base model by content, whatever it is called and wherever it lies."""

    name: str  # as the user gave it; for people
    fingerprint: str
    shapes: Mapping[str, tuple[int, int]]  # (R, C) by target module


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint as transformers finds them; raises BaseError.

    Others may lie beside them: Mistral's repositories hold the same weights again, in their own
    format.
    """
    index, single = directory / INDEX, directory / "model.safetensors"
    if single.exists():
        return [single]
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise BaseError(f"expected *.safetensors weights in {directory}, got none")
        return files
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(directory / name for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BaseError(f"{index}: expected an index of shards, got: {error!r}") from error


def fingerprint_checkpoint(directory: Path) -> str:
    """Return the sha256, in hex, over every tensor of a checkpoint's safetensors files.

    It covers name, dtype, shape and bytes in order of names, so sharding and file names do not
    matter, nor do device and compute dtype. Raises BaseError if there are no safetensors files, or
    broken ones.
    """
    digests: dict[str, str] = {}
    for file in weight_files(directory):
        try:
            digests |= dict(_tensor_digests(file))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise BaseError(f"{file}: expected whole safetensors, got: {error!r}") from error
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()


def _tensor_digests(file: Path) -> Iterator[tuple[str, str]]:
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:start])
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            low, high = (start + offset for offset in entry["data_offsets"])
            if not start <= low <= high <= len(data):
                raise ValueError(f"{name} at bytes {low} to {high} of {len(data)}")
            with memoryview(data)[low:high] as view:
                digest = hashlib.sha256(view)
            digest.update(f"{entry['dtype']}{entry['shape']}".encode())
            yield name, digest.hexdigest()
