"""The files behind adapters: which there are, what their headers say, what is in them.

Everything here blocks and runs on worker threads. A name stands for one file directly under the
root; a client never names a path.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import AdapterInfo
from spieldose_kernels.delta_file import SUFFIX, read_declared, read_delta, read_header
from spieldose_kernels.errors import DeltaError, TruncatedDelta
from spieldose_kernels.sliced import PackedAdapter, pack


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
                size = os.fstat(file.fileno()).st_size
                return size >= read_header(_header_bytes(file, size)).file_size
        except TruncatedDelta:
            return False
        except (DeltaError, OSError):
            return True

    def describe(self, name: str, stamp: Stamp) -> Description:
        """Validate what a header tells, without the tensors.

        Raises DeltaError, OSError, or FileChanged if the file is not as `stamp` says.
        """
        with open(self._path(name), "rb") as file:
            status = os.fstat(file.fileno())
            if Stamp.of(status) != stamp:
                raise FileChanged
            header = _header_bytes(file, status.st_size)
        info, declared = read_declared(header, file_size=status.st_size, base=self._base)
        return Description(info, sum(nnz for _, _, nnz in declared.values()))

    def read(self, name: str, stamp: Stamp) -> Content:
        """Read, validate and pack a file. Raises as `describe` does."""
        with open(self._path(name), "rb") as file:
            payload = file.read()
            if Stamp.of(os.fstat(file.fileno())) != stamp:
                raise FileChanged
        digest = hashlib.sha256(payload).hexdigest()
        adapter = read_delta(payload, self._base)
        description = Description(adapter.info, adapter.nnz)
        return Content(digest, description, pack(adapter, self._dtype))

    def _path(self, name: str) -> Path:
        return self.root / f"{name}{SUFFIX}"


def _header_bytes(file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    return start + file.read(min(int.from_bytes(start, "little"), size))
