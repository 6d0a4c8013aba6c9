"""The files behind adapters: which there are, what their headers say, what is in them.

Everything here blocks and runs on worker threads. A name stands for one file directly under the
root; a client never names a path.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import AdapterInfo
from spieldose_kernels.delta_file import SUFFIX, DeltaReader
from spieldose_kernels.delta_header import Declared, read_declaration, read_header
from spieldose_kernels.errors import DeltaError, TruncatedDelta
from spieldose_kernels.sliced import PackedAdapter, Packing


@dataclass(frozen=True, slots=True)
class Stamp:
    """Tell one state of a file from another."""

    inode: int
    size: int
    modified: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """Take the stamp of a file's status."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class FileChanged(Exception):
    """The file is not, or no longer, in the state that was asked for."""


@dataclass(frozen=True, slots=True)
class Description:
    """Hold what a file's header says of the adapter in it."""

    info: AdapterInfo
    nnz: int


@dataclass(frozen=True, slots=True)
class Content:
    """Hold a fully validated adapter in the device's form."""

    digest: str  # sha256 of the file, hex
    description: Description
    packed: PackedAdapter


class AdapterFiles:
    """Read the delta files of one directory, for one base."""

    def __init__(self, root: Path, base: BaseSpec, *, dtype: torch.dtype) -> None:
        self.root = root
        self._base = base
        self._dtype = dtype  # of values on the device

    def scan(self) -> dict[str, Stamp]:
        """Return the state of every delta file by its name. Raises OSError."""
        found = {}
        with os.scandir(self.root) as entries:
            for entry in entries:
                name, suffix = os.path.splitext(entry.name)
                if suffix == SUFFIX and not name.startswith(".") and entry.is_file():
                    try:
                        found[name] = Stamp.of(entry.stat())
                    except FileNotFoundError:  # gone since
                        continue
        return found

    def is_complete(self, name: str) -> bool:
        """Say whether a file is as long as its header declares; a foreign file is complete."""
        try:
            with open(self._path(name), "rb") as file:
                return os.fstat(file.fileno()).st_size >= read_header(file).file_size
        except TruncatedDelta:
            return False
        except (DeltaError, OSError):
            return True

    def describe(self, name: str, stamp: Stamp) -> Description:
        """Validate what a header tells, without the tensors.

        Raises DeltaError, OSError, or FileChanged if the file is not as `stamp` says.
        """
        with self._opened(name, stamp) as file:
            declaration = read_declaration(file, self._base)
        return _description(declaration.info, declaration.modules)

    def read(self, name: str, stamp: Stamp) -> Content:
        """Read, validate and pack a file. Raises as `describe` does.

        Never is the file in memory as a whole: only as it is packed, and the row starts.
        """
        with self._opened(name, stamp) as file:
            reader = DeltaReader(file, self._base)
            widths = {module: width for module, (_, width, _) in reader.modules.items()}
            packing = Packing(reader.row_starts, widths, self._dtype)
            for piece in reader.pieces():
                add = packing.add_columns if piece.part == "columns" else packing.add_values
                add(piece.module, piece.first, piece.entries)
        return Content(reader.digest, _description(reader.info, reader.modules), packing.packed)

    @contextmanager
    def _opened(self, name: str, stamp: Stamp) -> Iterator[BufferedReader]:
        """Open a file; raise FileChanged, whatever else is wrong, unless it stays as it was."""
        with open(self._path(name), "rb") as file:
            try:
                yield file
            finally:
                if Stamp.of(os.fstat(file.fileno())) != stamp:
                    raise FileChanged

    def _path(self, name: str) -> Path:
        return self.root / f"{name}{SUFFIX}"


def _description(info: AdapterInfo, declared: Declared) -> Description:
    return Description(info, sum(nnz for _, _, nnz in declared.values()))
