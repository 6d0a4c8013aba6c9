"""The files behind adapters: which there are, what their headers say, what is in them.

Everything here blocks and runs on worker threads. A name stands for one file directly under the
root, or for one below it that a link leads to; a client never names a path.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

import torch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta import AdapterInfo
from spieldose_kernels.delta_file import SUFFIX, DeltaReader
from spieldose_kernels.delta_header import Declared, read_declaration, read_header
from spieldose_kernels.errors import DeltaError, NotADelta, TruncatedDelta, UntrustedDelta
from spieldose_kernels.signature import MAX_SIGNATURE_BYTES, SIGNATURE_SUFFIX, Signature
from spieldose_kernels.sliced import PackedAdapter, Packing
from spieldose_server.inside import leads_out, open_inside
from spieldose_server.stamp import Stamp
from spieldose_server.trusted_keys import TrustedKeys


@dataclass(frozen=True, slots=True)
class FileStamp(Stamp):
    """Tell one state of a delta file, and of the signature beside it, from another."""

    signature: Stamp | None = None


class FileChanged(Exception):
    """The file is not, or no longer, in the state that was asked for."""


@dataclass(frozen=True, slots=True)
class Description:
    """Hold what a file's header says of the adapter in it."""

    info: AdapterInfo
    nnz: int
    signature: Signature | None  # that vouches for it, if one has to


@dataclass(frozen=True, slots=True)
class Content:
    """Hold a fully validated adapter in the device's form."""

    digest: str  # sha256 of the file, hex
    description: Description
    packed: PackedAdapter


class AdapterFiles:
    """Read the delta files of one directory, for one base; with keys, only what they signed."""

    def __init__(
        self,
        root: Path,
        base: BaseSpec,
        *,
        dtype: torch.dtype,
        pinned: bool = False,
        keys: TrustedKeys | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Read them with a `rest` between any two pieces, for a GPU into `pinned` memory."""
        self.root = root
        self._rest = rest
        self._keys = keys
        self._base = base
        self._dtype = dtype  # of values on the device
        self._pinned = pinned

    def scan(self) -> dict[str, FileStamp]:
        """Return the state of whatever bears a delta file's name, by that name. Raises OSError.

        Hidden names, and those no client could write or no terminal show, stand for nothing.
        """
        found: dict[str, FileStamp] = {}
        signatures: dict[str, Stamp] = {}
        root = os.path.realpath(self.root)
        with os.scandir(root) as entries:
            for entry in entries:
                name, suffix = os.path.splitext(entry.name)
                if name.startswith(".") or not name.isprintable():
                    continue
                if suffix == SUFFIX and (stamp := _stamp(root, entry)):
                    found[name] = stamp
                elif (
                    self._keys is not None
                    and entry.name.endswith(SUFFIX + SIGNATURE_SUFFIX)
                    and (stamp := _stamp(root, entry))
                ):
                    signatures[name.removesuffix(SUFFIX)] = stamp
        return {
            name: replace(stamp, signature=signatures.get(name)) for name, stamp in found.items()
        }

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
        """Validate what a header tells, without the tensors, and that its signer is trusted.

        Raises DeltaError, OSError, or FileChanged if the file is not as `stamp` says.
        """
        with self._opened(name, stamp) as file:
            declaration = read_declaration(file, self._base)
            header = declaration.bytes_read.hexdigest()
            signature = self._vouching(name, None, header=header)
        return _description(declaration.info, declaration.modules, signature)

    def read(self, name: str, stamp: Stamp, vouched: Signature | None = None) -> Content:
        """Read, validate and pack a file. Raises as `describe` does.

        `vouched` is the signature of what was read before: of the same content it still holds.
        Never is the file in memory as a whole: only as it is packed, and the row starts.
        """
        with self._opened(name, stamp) as file:
            reader = DeltaReader(file, self._base)
            widths = {module: width for module, (_, width, _) in reader.modules.items()}
            packing = Packing(reader.row_starts, widths, self._dtype, pinned=self._pinned)
            for piece in reader.pieces():
                add = packing.add_columns if piece.part == "columns" else packing.add_values
                add(piece.module, piece.first, piece.entries)
                self._rest()
            signature = self._vouching(name, vouched, digest=reader.digest)
        description = _description(reader.info, reader.modules, signature)
        return Content(reader.digest, description, packing.packed)

    def _vouching(
        self, name: str, vouched: Signature | None, *, header: str = "", digest: str = ""
    ) -> Signature | None:
        """Return a trusted key's signature of a file, or of a header if there is no digest yet.

        None: no file needs one. Raises UntrustedDelta.
        """
        if self._keys is None:
            return None
        try:
            signature = self._signature(name)
            self._keys.check(signature)
            assert signature is not None
            got, wanted = (signature.digest, digest) if digest else (signature.header, header)
            if got != wanted:
                raise UntrustedDelta("expected a signature of this file, got one of another")
        except UntrustedDelta:
            # the file beside may be its replacement's already
            known = vouched is not None and vouched.digest == digest
            if vouched is None or not known or not vouched.is_by(self._keys.current()):
                raise
            return vouched
        return signature

    def _signature(self, name: str) -> Signature | None:
        """Return what the file beside a delta file says; None: there is none."""
        beside = f"{name}{SUFFIX}{SIGNATURE_SUFFIX}"
        try:
            with open_inside(self.root, beside) as file:
                content = file.read(MAX_SIGNATURE_BYTES + 1)
        except FileNotFoundError:
            return None
        except (OSError, NotADelta) as error:
            raise UntrustedDelta(f"{beside}: {error}") from error
        return Signature.parse(content)

    @contextmanager
    def _opened(self, name: str, stamp: Stamp) -> Iterator[BufferedReader]:
        """Open a file; raise FileChanged, whatever else is wrong, unless it stays as it was."""
        if "@" in name:
            raise NotADelta("expected a name without @, which begins a digest")
        with open_inside(self.root, f"{name}{SUFFIX}") as file:
            try:
                yield file
            finally:
                now = Stamp.of(os.fstat(file.fileno()))
                if now != Stamp(stamp.inode, stamp.size, stamp.modified, stamp.changed):
                    raise FileChanged


def _description(info: AdapterInfo, declared: Declared, signature: Signature | None) -> Description:
    return Description(info, sum(nnz for _, _, nnz in declared.values()), signature)


def _stamp(root: str, entry: os.DirEntry[str]) -> FileStamp | None:
    """Return a file's state, or that of a link that is no use; None: there is no file."""
    try:
        out = entry.is_symlink() and leads_out(root, entry.name)  # then it is not even looked at
        return FileStamp.of(entry.stat(follow_symlinks=not out))
    except FileNotFoundError:  # gone since, or what a link led to
        return None
    except OSError:  # a link in a circle, say: opening it will tell
        with suppress(FileNotFoundError):
            return FileStamp.of(entry.stat(follow_symlinks=False))
        return None
