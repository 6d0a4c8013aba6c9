"""The delta file: one adapter in one safetensors file, written whole or not at all.

Per module three tensors, `<module>.row_starts` [R + 1] int32, `<module>.columns` [Z] uint16 (int32
above 65,536 columns) and `<module>.values` [Z] bfloat16 or float32. The metadata names the format
and its version, the base, the method and, under `modules`, what each module declares: [R, C, Z];
an adapter with a chat template of its own has it under `chat_template`.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import safetensors.torch
import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.cpu.columns import misplaced
from spieldose_kernels.delta import Adapter, SparseDelta
from spieldose_kernels.delta_header import (
    FORMAT,
    FORMAT_VERSION,
    PARTS,
    Declared,
    Extent,
    read_declaration,
    read_header,
)
from spieldose_kernels.errors import MalformedDelta, TruncatedDelta

SUFFIX: Final = ".safetensors"
PIECE_BYTES: Final = 1 << 17


def write_delta(path: Path, adapter: Adapter) -> None:
    """Write `adapter` to `path` so that no reader ever sees half of it.

    The bytes go to a temporary name in the same directory, are fsynced, and renamed. Raises
    DeltaError, and writes nothing, if values are not finite, or if the header is more than readers
    accept: a great many modules with next to no rows.
    """
    for module, delta in adapter.modules.items():
        _check_finite(module, delta.values)
    tensors = {
        f"{module}.{part}": getattr(delta, part).detach().cpu().contiguous()
        for module, delta in adapter.modules.items()
        for part in PARTS
    }
    payload = safetensors.torch.save(tensors, metadata=_metadata(adapter))
    read_header(io.BytesIO(payload))
    temporary = temporary_beside(path)
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


def is_playable(values: torch.Tensor) -> bool:
    """Say whether values are finite as bfloat16, too, which the largest of float32 are not."""
    return bool(values.bfloat16().isfinite().all())


def _check_finite(module: str, values: torch.Tensor) -> None:
    if not is_playable(values):
        raise MalformedDelta(f"{module}.values: expected finite values, got NaN or infinity")


def temporary_beside(path: Path) -> Path:
    """Return where `write_delta` writes before it renames."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def read_delta(source: bytes | io.BufferedIOBase, base: BaseSpec | None = None) -> Adapter:
    """Read and fully validate a delta file or its bytes, against `base` unless it is None.

    Raises NotADelta, TruncatedDelta, MalformedDelta, BaseMismatch or ModuleMismatch.
    """
    reader = DeltaReader(io.BytesIO(source) if isinstance(source, bytes) else source, base)
    modules = {
        module: SparseDelta(
            reader.row_starts[module],
            reader.empty(module, "columns"),
            reader.empty(module, "values"),
            width,
        )
        for module, (_, width, _) in reader.modules.items()
    }
    for piece in reader.pieces():
        whole: torch.Tensor = getattr(modules[piece.module], piece.part)
        whole[piece.first : piece.first + piece.entries.numel()] = piece.entries
    return Adapter(reader.info, modules)


@dataclass(frozen=True, slots=True)
class Piece:
    """Hold some of a module's columns or values, those from entry `first` on."""

    module: str
    part: str
    first: int
    entries: torch.Tensor


class DeltaReader:
    """Read a delta file piece by piece, every one validated before it is given out.

    It holds the row starts and one piece. Of a file that is written to meanwhile it gives out what
    `digest` stands for, or raises. All of it raises what `read_delta` does.
    """

    def __init__(self, file: io.BufferedIOBase, base: BaseSpec | None = None) -> None:
        declaration = read_declaration(file, base)
        self.info = declaration.info
        self.modules: Declared = declaration.modules
        self.digest = ""  # sha256 of the file, hex; once all pieces were read
        self._file = file
        self._extents = {(extent.module, extent.part): extent for extent in declaration.extents}
        self._bytes_read = declaration.bytes_read
        self.row_starts = {
            module: self._read_row_starts(self._extents[module, "row_starts"])
            for module in self.modules
        }

    def empty(self, module: str, part: str) -> torch.Tensor:
        """Return memory for one of the arrays, as long and of the type that the file says."""
        extent = self._extents[module, part]
        return torch.empty(extent.count, dtype=extent.dtype)

    def pieces(self) -> Iterator[Piece]:
        """Read columns and values, once, in the order in which they lie in the file."""
        for extent in self._extents.values():
            before = -1
            step = PIECE_BYTES // extent.dtype.itemsize
            for first in range(0, extent.count, step):
                entries = self._read(extent, first, min(step, extent.count - first))
                self._bytes_read.update(entries.view(torch.uint8).numpy().data)
                piece = Piece(extent.module, extent.part, first, entries)
                if extent.part == "row_starts":
                    self._check_unchanged(piece)
                    continue
                if extent.part == "columns":
                    self._check_columns(piece, before)
                    before = int(entries[-1])
                else:
                    _check_finite(extent.module, entries)
                yield piece
        self.digest = self._bytes_read.hexdigest()

    def _read(self, extent: Extent, first: int, count: int) -> torch.Tensor:
        size = extent.dtype.itemsize
        memory = np.empty(count * size, np.uint8)
        self._file.seek(extent.start + first * size)
        if (got := self._file.readinto(memory.data)) != memory.size:
            raise TruncatedDelta(
                f"{extent.module}.{extent.part}: expected {memory.size} bytes, got {got}"
            )
        return torch.from_numpy(memory).view(extent.dtype)

    def _read_row_starts(self, extent: Extent) -> torch.Tensor:
        row_starts = self._read(extent, 0, extent.count)
        nnz = self.modules[extent.module][2]
        ends = int(row_starts[0]), int(row_starts[-1])
        if ends != (0, nnz):
            raise MalformedDelta(
                f"{extent.module}.row_starts: expected 0 to {nnz}, got {ends[0]} to {ends[1]}"
            )
        if bool((row_starts[1:] < row_starts[:-1]).any()):
            raise MalformedDelta(
                f"{extent.module}.row_starts: expected ascending starts, got a step back"
            )
        return row_starts

    def _check_unchanged(self, piece: Piece) -> None:
        end = piece.first + piece.entries.numel()
        if not torch.equal(piece.entries, self.row_starts[piece.module][piece.first : end]):
            raise MalformedDelta(f"{piece.module}.row_starts: expected a file that stays as it is")

    def _check_columns(self, piece: Piece, before: int) -> None:
        row_starts, width = self.row_starts[piece.module], self.modules[piece.module][1]
        columns = piece.entries.numpy()
        at = misplaced(row_starts.numpy(), piece.first, before, columns, width)
        if at == columns.size:
            return
        if not 0 <= columns[at] < width:
            raise MalformedDelta(
                f"{piece.module}.columns: expected indices below {width}, got {columns[at]}"
            )
        raise MalformedDelta(
            f"{piece.module}.columns: expected strictly ascending rows, got a repeat or a step back"
        )


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


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
