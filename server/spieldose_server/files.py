"""The files behind adapters: which there are, what their headers say, what is in them.

Everything here blocks and runs on worker threads. A name stands for one file directly under the
root, or for one below it that a link leads to; a client never names a path.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import AdapterInfo
from spieldose_kernels.delta_file import SUFFIX, DeltaReader
from spieldose_kernels.delta_header import Declared, read_declaration, read_header
from spieldose_kernels.errors import DeltaError, NotADelta, TruncatedDelta
from spieldose_kernels.sliced import PackedAdapter, Packing
from spieldose_server.inside import leads_out, open_inside


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
        """Return the state of whatever bears a delta file's name, by that name. Raises OSError.

        Hidden names, and those no client could write or no terminal show, stand for nothing.
        """
        found = {}
        root = os.path.realpath(self.root)
        with os.scandir(root) as entries:
            for entry in entries:
                name, suffix = os.path.splitext(entry.name)
                if suffix == SUFFIX and not name.startswith(".") and name.isprintable():
                    stamp = _stamp(root, entry)
                    if stamp is not None:
                        found[name] = stamp
        return found

    def is_complete(self, name: str) -> bool:
        """Say whether a file is as long as its header declares; a foreign file is complete."""
        try:
            with open_inside(self.root, f"{name}{SUFFIX}") as file:
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
        if "@" in name:
            raise NotADelta("expected a name without @, which begins a digest")
        with open_inside(self.root, f"{name}{SUFFIX}") as file:
            try:
                yield file
            finally:
                if Stamp.of(os.fstat(file.fileno())) != stamp:
                    raise FileChanged


def _description(info: AdapterInfo, declared: Declared) -> Description:
    return Description(info, sum(nnz for _, _, nnz in declared.values()))


def _stamp(root: str, entry: os.DirEntry[str]) -> Stamp | None:
    """Return a file's state, or that of a link that is no use; None: there is no file."""
    try:
        out = entry.is_symlink() and leads_out(root, entry.name)  # then it is not even looked at
        return Stamp.of(entry.stat(follow_symlinks=not out))
    except FileNotFoundError:  # gone since, or what a link led to
        return None
    except OSError:  # a link in a circle, say: opening it will tell
        with suppress(FileNotFoundError):
            return Stamp.of(entry.stat(follow_symlinks=False))
        return None
