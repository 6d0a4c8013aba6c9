"""What a delta file says before its data: its metadata, and where which array lies.

The header may be anything: it is checked as a whole before a byte of the data is read, so that
what comes after it can rely on every length, and no claim in it costs memory.
"""

import hashlib
import io
import itertools
import json
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, Final

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import AdapterInfo, index_dtype
from spieldose_kernels.errors import (
    BaseMismatch,
    MalformedDelta,
    ModuleMismatch,
    NotADelta,
    TruncatedDelta,
)

FORMAT: Final = "spieldose.delta"
FORMAT_VERSION: Final = "1"
PARTS: Final = ("row_starts", "columns", "values")
VALUE_DTYPES: Final = (torch.bfloat16, torch.float32)
NAMES: Final = {  # the format's, of the types there are in a delta
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors format's own limit
# JSON takes up to 37 times its bytes in memory; with no more brackets than there are in a table up
# to 22 times, such a table itself 9. So a header that is not small has to look like one, and to be
# a twelfth of its file at most. A 135 million parameter model's adapter with all modules empty has
# 73 kB of 696; any entries make it less.
SMALL_HEADER_BYTES: Final = 3 << 13
HEADERS_IN_A_FILE: Final = 12
BYTES_PER_BRACKET: Final = 16  # 20 and more in what `write_delta` writes
MAX_WIDTH: Final = 1 << 31  # columns are int32
# what foreign JSON does to code that expects ours
UNREADABLE: Final = (ValueError, TypeError, AttributeError, RecursionError)

# [R, C, Z] by module
Declared = dict[str, tuple[int, int, int]]

_short = Repr()
_short.maxstring = _short.maxother = 80
shown = _short.repr  # what a file says, short enough to be told


@dataclass(frozen=True, slots=True)
class Extent:
    """Say where in a file an array lies."""

    module: str
    part: str
    dtype: torch.dtype
    count: int
    start: int  # in bytes


@dataclass(frozen=True, slots=True)
class Header:
    """Hold what a safetensors file says of itself before its data."""

    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    size: int  # bytes before the data
    file_size: int  # bytes the whole file has when it is complete
    bytes_read: "hashlib._Hash"  # sha256 of those before the data


@dataclass(frozen=True, slots=True)
class Declaration:
    """Hold what a delta file declares, all of it checked against itself and the file's size."""

    info: AdapterInfo
    modules: Declared
    extents: tuple[Extent, ...]  # as they lie in the file, one after the other
    bytes_read: "hashlib._Hash"  # sha256 of those before the data


def read_declaration(file: io.BufferedIOBase, base: BaseSpec | None = None) -> Declaration:
    """Read and validate what a delta file declares, against `base` unless it is None.

    Raises NotADelta, TruncatedDelta, MalformedDelta, BaseMismatch or ModuleMismatch.
    """
    header = read_header(file)
    file_size = file.seek(0, os.SEEK_END)
    if file_size != header.file_size:
        kind = TruncatedDelta if file_size < header.file_size else MalformedDelta
        raise kind(f"header declares a file of {header.file_size} bytes, got {file_size} bytes")
    info, modules = _read_metadata(header.metadata)
    if base is not None:
        _check_base(info, modules, base)
    _check_names(header.tensors.keys(), modules)
    return Declaration(info, modules, _extents(header, modules), header.bytes_read)


def read_header(file: io.BufferedIOBase) -> Header:
    """Read the header at the front of a safetensors file, which may end after it.

    Raises NotADelta if this cannot be a safetensors file, TruncatedDelta if the header is cut off.
    """
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(9)
    if len(start) < 8:
        raise TruncatedDelta(f"expected at least 8 bytes of header size, got {len(start)}")
    size = int.from_bytes(start[:8], "little")
    if not 2 <= size <= MAX_HEADER_BYTES or (len(start) > 8 and start[8] != ord("{")):
        raise NotADelta(f"expected a safetensors file, got {_kind(start[:8])}")
    if file_size < 8 + size:
        raise TruncatedDelta(f"header declares {size} bytes of itself, got {file_size - 8}")
    if (least := (size - SMALL_HEADER_BYTES) * HEADERS_IN_A_FILE) > file_size:
        raise TruncatedDelta(
            f"header of {size} bytes: expected a file of {least} bytes or more, got {file_size}"
        )
    file.seek(8)
    text = file.read(size)
    if len(text) < size:
        raise TruncatedDelta(f"header declares {size} bytes of itself, got {len(text)}")
    brackets = text.count(b"[") + text.count(b"{")
    if size > SMALL_HEADER_BYTES and brackets * BYTES_PER_BRACKET > size:
        raise NotADelta("expected a safetensors header, got too many brackets for one")
    bytes_read = hashlib.sha256(start[:8])
    bytes_read.update(text)
    try:
        entries = _load(str(text, "utf-8"))
        metadata = entries.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise MalformedDelta("expected metadata that maps strings to strings, got other values")
        for words in itertools.chain(entries, metadata, metadata.values()):
            words.encode()  # JSON knows halves of characters, which nothing could print
    except (*UNREADABLE, LookupError) as error:
        raise NotADelta(f"expected a safetensors header, got {type(error).__name__}") from error
    return Header(entries, metadata, 8 + size, 8 + size + end, bytes_read)


def _load(text: str) -> Any:
    return json.loads(
        text, object_pairs_hook=_distinct, parse_float=_refused, parse_constant=_refused
    )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pairs.reverse()
    while pairs:  # not both at once in memory
        name, value = pairs.pop()
        if name in found:
            raise ValueError("a name twice")
        found[name] = value
    return found


def _refused(text: str) -> None:
    raise ValueError(f"a number that is not whole: {shown(text)}")


def _kind(start: bytes) -> str:
    # asked only once the file is known to be foreign: one header size in 32 begins with 0x80 too
    if start.startswith((b"PK", b"\x80")):
        return "a pickle (pickles are never read)"
    return f"{start!r} as its first bytes"


def _read_metadata(metadata: Mapping[str, str]) -> tuple[AdapterInfo, Declared]:
    found = metadata.get("format"), metadata.get("format_version")
    if found != (FORMAT, FORMAT_VERSION):
        raise NotADelta(
            f"expected format {FORMAT!r} version {FORMAT_VERSION!r}, "
            f"got {shown(found[0])} version {shown(found[1])}"
        )
    try:
        info = AdapterInfo(
            base_model=metadata["base_model"],
            base_fingerprint=metadata["base_fingerprint"],
            method=metadata["method"],
            density=float(metadata["density"]),
            description=metadata["description"],
            settings=_settings(metadata["settings"]),
            chat_template=metadata.get("chat_template", ""),
        )
        declared = {
            name: (_whole(height), _whole(width), _whole(nnz))
            for name, (height, width, nnz) in _load(metadata["modules"]).items()
        }
    except KeyError as error:
        raise MalformedDelta(f"expected {error} in the metadata, got none") from error
    except UNREADABLE as error:
        raise MalformedDelta(f"expected readable metadata, got {error}") from error
    if not 0 <= info.density <= 1:
        raise MalformedDelta(f"expected a density from 0 to 1, got {info.density}")
    if not declared:
        raise ModuleMismatch("expected at least one module, got none")
    return info, declared


def _settings(text: str) -> dict[str, str]:
    settings = {str(name): str(value) for name, value in json.loads(text).items()}
    for words in itertools.chain(settings, settings.values()):
        words.encode()
    return settings


def _whole(number: Any) -> int:
    if type(number) is not int:  # True is one, too
        raise TypeError(f"{shown(number)} for a whole number")
    return number


def _check_base(info: AdapterInfo, declared: Declared, base: BaseSpec) -> None:
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


def _check_names(found: Set[str], declared: Declared) -> None:
    expected = {f"{module}.{part}" for module in declared for part in PARTS}
    if missing := expected - found:
        raise MalformedDelta(f"expected tensor {min(missing)!r}, got none of that name")
    if unmatched := found - expected:
        raise MalformedDelta(f"expected only tensors of declared modules, got {min(unmatched)!r}")


def _extents(header: Header, declared: Declared) -> tuple[Extent, ...]:
    """Return where the arrays lie. Raises MalformedDelta unless they fill the file as declared."""
    found = []
    for module, (height, width, nnz) in declared.items():
        if height < 1 or not 1 <= width <= MAX_WIDTH:
            raise MalformedDelta(
                f"{module}: expected a positive shape of at most {MAX_WIDTH} columns, "
                f"got {[height, width]}"
            )
        kinds = ((torch.int32,), (index_dtype(width),), VALUE_DTYPES)
        counts = (height + 1, nnz, nnz)
        for part, dtypes, count in zip(PARTS, kinds, counts, strict=True):
            name = f"{module}.{part}"
            dtype, start = _check_entry(name, header.tensors[name], dtypes=dtypes, count=count)
            found.append(Extent(module, part, dtype, count, header.size + start))
    found.sort(key=lambda extent: (extent.start, extent.count))
    end = header.size
    for extent in found:
        if extent.start != end:
            raise MalformedDelta(
                f"{extent.module}.{extent.part}: expected data from byte {end} of the file, "
                f"got {extent.start}"
            )
        end += extent.count * extent.dtype.itemsize
    return tuple(found)


def _check_entry(
    name: str, entry: Mapping[str, Any], *, dtypes: tuple[torch.dtype, ...], count: int
) -> tuple[torch.dtype, int]:
    """Return an array's dtype and where it begins, counted from the header's end."""
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedDelta(f"{name}: expected dtype, shape and data_offsets, got {shown(entry)}")
    known = {NAMES[dtype]: dtype for dtype in dtypes}
    got, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(got, str) or got not in known:
        raise MalformedDelta(f"{name}: expected {' or '.join(known)}, got {shown(got)}")
    if shape != [count] or type(shape[0]) is not int:
        raise MalformedDelta(f"{name}: expected shape {[count]}, got {shown(shape)}")
    size = count * known[got].itemsize
    try:
        start, end = map(_whole, offsets)
    except (ValueError, TypeError) as error:
        raise MalformedDelta(f"{name}: expected two offsets, got {shown(offsets)}") from error
    if start < 0 or end - start != size:
        raise MalformedDelta(f"{name}: expected {size} bytes of data, got {shown(offsets)}")
    return known[got], start
