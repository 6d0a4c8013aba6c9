"""The delta file: one adapter in one safetensors file, written whole or not at all.

Per module three tensors, `<module>.row_starts` [R + 1] int32, `<module>.columns` [Z] uint16 (int32
above 65,536 columns) and `<module>.values` [Z] bfloat16 or float32. The metadata names the format
and its version, the base, the method and, under `modules`, what each module declares: [R, C, Z];
an adapter with a chat template of its own has it under `chat_template`.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.chat_template import check_chat_template
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta, index_dtype
from spieldose_kernels.errors import (
    BaseMismatch,
    MalformedDelta,
    ModuleMismatch,
    NotADelta,
    TruncatedDelta,
)

SUFFIX: Final = ".safetensors"
FORMAT: Final = "spieldose.delta"
FORMAT_VERSION: Final = "1"
PARTS: Final = ("row_starts", "columns", "values")
VALUE_DTYPES: Final = (torch.bfloat16, torch.float32)
MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors format's own limit
# what foreign JSON does to code that expects ours; overflow: JSON knows Infinity, int() does not
UNREADABLE: Final = (ValueError, TypeError, AttributeError, OverflowError, RecursionError)


# [R, C, Z] by module
Declared = dict[str, tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Header:
    """Hold what a safetensors file says of itself before its data."""

    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    file_size: int  # bytes the whole file has when it is complete


def write_delta(path: Path, adapter: Adapter) -> None:
    """Write `adapter` to `path` so that no reader ever sees half of it.

    The bytes go to a temporary name in the same directory, are fsynced, and renamed.
    """
    tensors = {
        f"{module}.{part}": getattr(delta, part).detach().cpu().contiguous()
        for module, delta in adapter.modules.items()
        for part in PARTS
    }
    payload = safetensors.torch.save(tensors, metadata=_metadata(adapter))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    _fsync_directory(path.parent)


def read_delta(payload: bytes, base: BaseSpec | None = None) -> Adapter:
    """Read and fully validate the bytes of a delta file, against `base` unless it is None.

    Raises NotADelta, TruncatedDelta, MalformedDelta, BaseMismatch or ModuleMismatch.
    """
    info, declared = read_declared(payload, file_size=len(payload), base=base)
    try:
        tensors = safetensors.torch.load(payload)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # torch appends its stack
        raise MalformedDelta(f"expected readable tensors, got {reason}") from error
    modules = {}
    for module, (height, width, nnz) in declared.items():
        row_starts, columns, values = (tensors[f"{module}.{part}"] for part in PARTS)
        delta = SparseDelta(row_starts, columns, values, width)
        _check_arrays(module, delta, height=height, nnz=nnz)
        modules[module] = delta
    return Adapter(info, modules)


def read_declared(
    payload: bytes, *, file_size: int, base: BaseSpec | None = None
) -> tuple[AdapterInfo, Declared]:
    """Read and validate what a file declares before its data; `payload` may end after the header.

    Raises what `read_delta` raises, save what only the tensors can show.
    """
    header = read_header(payload)
    if file_size != header.file_size:
        kind = TruncatedDelta if file_size < header.file_size else MalformedDelta
        raise kind(f"header declares a file of {header.file_size} bytes, got {file_size} bytes")
    info, declared = _read_metadata(header.metadata)
    if base is not None:
        _check_base(info, declared, base)
    _check_names(set(header.tensors), declared)
    return info, declared


def read_header(payload: bytes | memoryview) -> Header:
    """Read the header at the front of a safetensors file; `payload` may end after it.

    Raises NotADelta if this cannot be a safetensors file, TruncatedDelta if the header is cut off.
    """
    if len(payload) < 8:
        raise TruncatedDelta(f"expected at least 8 bytes of header size, got {len(payload)}")
    size = int.from_bytes(payload[:8], "little")
    if not 2 <= size <= MAX_HEADER_BYTES or (len(payload) > 8 and payload[8] != ord("{")):
        raise NotADelta(f"expected a safetensors file, got {_kind(bytes(payload[:8]))}")
    if len(payload) < 8 + size:
        raise TruncatedDelta(f"header declares {size} bytes of itself, got {len(payload) - 8}")
    try:
        entries = json.loads(bytes(payload[8 : 8 + size]))
        metadata = entries.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        strings = all(isinstance(value, str) for value in metadata.values())
    except (*UNREADABLE, LookupError) as error:
        raise NotADelta(f"expected a safetensors header, got {type(error).__name__}") from error
    if not strings:
        raise MalformedDelta("expected metadata that maps strings to strings, got other values")
    return Header(entries, metadata, 8 + size + end)


def _kind(start: bytes) -> str:
    # asked only once the file is known to be foreign: one header size in 32 begins with 0x80 too
    if start.startswith((b"PK", b"\x80")):
        return "a pickle (pickles are never read)"
    return f"{start!r} as its first bytes"


def _metadata(adapter: Adapter) -> dict[str, str]:
    info = adapter.info
    declared = {name: [*delta.shape, delta.nnz] for name, delta in adapter.modules.items()}
    template = {"chat_template": info.chat_template} if info.chat_template else {}
    return template | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_model": info.base_model,
        "base_fingerprint": info.base_fingerprint,
        "method": info.method,
        "density": repr(info.density),
        "description": info.description,
        "settings": json.dumps(dict(info.settings)),
        "modules": json.dumps(declared),
    }


def _read_metadata(
    metadata: Mapping[str, str],
) -> tuple[AdapterInfo, Declared]:
    found = metadata.get("format"), metadata.get("format_version")
    if found != (FORMAT, FORMAT_VERSION):
        raise NotADelta(
            f"expected format {FORMAT!r} version {FORMAT_VERSION!r}, "
            f"got {found[0]!r} version {found[1]!r}"
        )
    try:
        info = AdapterInfo(
            base_model=metadata["base_model"],
            base_fingerprint=metadata["base_fingerprint"],
            method=metadata["method"],
            density=float(metadata["density"]),
            description=metadata["description"],
            settings={str(k): str(v) for k, v in json.loads(metadata["settings"]).items()},
            chat_template=metadata.get("chat_template", ""),
        )
        check_chat_template(info.chat_template)
        declared = {
            name: (int(height), int(width), int(nnz))
            for name, (height, width, nnz) in json.loads(metadata["modules"]).items()
        }
    except KeyError as error:
        raise MalformedDelta(f"expected {error} in the metadata, got none") from error
    except UNREADABLE as error:
        raise MalformedDelta(f"expected readable metadata, got {error}") from error
    if not declared:
        raise ModuleMismatch("expected at least one module, got none")
    return info, declared


def _check_base(
    info: AdapterInfo, declared: Mapping[str, tuple[int, int, int]], base: BaseSpec
) -> None:
    if info.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"expected base {base.fingerprint[:12]} ({base.name}), "
            f"got a delta for base {info.base_fingerprint[:12]} ({info.base_model})"
        )
    for module, (height, width, _) in declared.items():
        if module not in base.shapes:
            raise ModuleMismatch(f"expected a target module of the base, got {module!r}")
        if (height, width) != base.shapes[module]:
            expected = list(base.shapes[module])
            raise ModuleMismatch(f"{module}: expected shape {expected}, got {[height, width]}")


def _check_names(found: set[str], declared: Mapping[str, tuple[int, int, int]]) -> None:
    expected = {f"{module}.{part}" for module in declared for part in PARTS}
    if missing := sorted(expected - found):
        raise MalformedDelta(f"expected tensor {missing[0]!r}, got none of that name")
    if unmatched := sorted(found - expected):
        raise MalformedDelta(f"expected only tensors of declared modules, got {unmatched[0]!r}")


def _check_arrays(module: str, delta: SparseDelta, *, height: int, nnz: int) -> None:
    """Raise MalformedDelta unless the three arrays are one well-formed [height, width] CSR."""
    if height < 1 or delta.width < 1:
        raise MalformedDelta(f"{module}: expected a positive shape, got {[height, delta.width]}")
    expected = (
        (height + 1, (torch.int32,)),
        (nnz, (index_dtype(delta.width),)),
        (nnz, VALUE_DTYPES),
    )
    for part, (length, dtypes) in zip(PARTS, expected, strict=True):
        tensor: torch.Tensor = getattr(delta, part)
        if tuple(tensor.shape) != (length,):
            raise MalformedDelta(
                f"{module}.{part}: expected shape {[length]}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in dtypes:
            names = " or ".join(map(str, dtypes))
            raise MalformedDelta(f"{module}.{part}: expected {names}, got {tensor.dtype}")
    _check_row_starts(module, delta.row_starts, nnz)
    _check_columns(module, delta)
    if not bool(torch.isfinite(delta.values).all()):
        raise MalformedDelta(f"{module}.values: expected finite values, got NaN or infinity")


def _check_row_starts(module: str, row_starts: torch.Tensor, nnz: int) -> None:
    ends = int(row_starts[0]), int(row_starts[-1])
    if ends != (0, nnz):
        raise MalformedDelta(
            f"{module}.row_starts: expected 0 to {nnz}, got {ends[0]} to {ends[1]}"
        )
    if bool((row_starts.long().diff() < 0).any()):
        raise MalformedDelta(f"{module}.row_starts: expected ascending starts, got a step back")


def _check_columns(module: str, delta: SparseDelta) -> None:
    columns = delta.columns.int()
    outside = columns[(columns < 0) | (columns >= delta.width)]
    if outside.numel():
        raise MalformedDelta(
            f"{module}.columns: expected indices below {delta.width}, got {int(outside[0])}"
        )
    opens_row = torch.zeros(delta.nnz + 1, dtype=torch.bool)
    opens_row[delta.row_starts.long()] = True
    if bool(((columns.diff() <= 0) & ~opens_row[1 : delta.nnz]).any()):
        raise MalformedDelta(
            f"{module}.columns: expected strictly ascending rows, got a repeat or a step back"
        )


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
