"""The adapter directory: new files are taken up, changed ones replaced, removed ones retired.

A file is read once it is complete (as long as its header declares) and has not changed for a
moment; one that stays incomplete is rejected. Reading and validating happen on a worker thread.
"""

import asyncio
import hashlib
import logging
import os
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import torch
from watchfiles import awatch

from spieldose_kernels.base_spec import BaseSpec
from spieldose_kernels.delta_file import SUFFIX, read_delta, read_header
from spieldose_kernels.errors import DeltaError, TruncatedDelta
from spieldose_kernels.sliced import pack
from spieldose_server.errors import RejectedAdapter, UnknownAdapter
from spieldose_server.store import AdapterStore, Candidate

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2  # a file unchanged for so long, and complete, is read
PATIENCE_SECONDS = 3.0  # an incomplete file unchanged for so long is not being written any more
RESCAN_MILLISECONDS = 1000  # for file systems that report no events


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


class _Changing(Exception):
    """The file changed while it was read."""


class AdapterDirectory:
    """Keep the store in step with a directory of delta files."""

    def __init__(
        self,
        path: Path,
        store: AdapterStore,
        base: BaseSpec,
        *,
        dtype: torch.dtype,  # of resident values
        loader: Executor,
    ) -> None:
        self._path = path
        self._store = store
        self._base = base
        self._dtype = dtype
        self._loader = loader
        self._taken: dict[str, Stamp] = {}  # the file state last published, rejected or unloaded
        self._seen: dict[str, tuple[Stamp, float]] = {}  # not yet settled, and since when
        self._busy = asyncio.Lock()  # one reconciliation at a time

    async def take_up(self) -> None:
        """Take up every file that lies complete in the directory now."""
        await self.reconcile()
        await asyncio.sleep(SETTLE_SECONDS)
        await self.reconcile()

    async def watch(self) -> None:
        """Follow the directory until cancelled."""
        async for _ in awatch(
            self._path,
            watch_filter=None,
            recursive=False,
            debounce=50,
            step=25,
            rust_timeout=RESCAN_MILLISECONDS,
            yield_on_timeout=True,
        ):
            while await self.reconcile():
                await asyncio.sleep(SETTLE_SECONDS)

    async def reconcile(self) -> bool:
        """Compare the directory with what is known; return whether a file has yet to settle."""
        async with self._busy:
            found = await asyncio.to_thread(self._scan)
            for name in self._taken.keys() - found.keys():
                del self._taken[name]
                self._store.retire(name)
            self._seen = {name: seen for name, seen in self._seen.items() if name in found}
            for name, stamp in found.items():
                if stamp != self._taken.get(name):
                    await self._consider(name, stamp)
            return bool(self._seen)

    async def load(self, name: str) -> None:
        """Take up a file now. Raises UnknownAdapter if it is not there, RejectedAdapter if bad."""
        async with self._busy:
            found = await asyncio.to_thread(self._scan)
            if name not in found:
                raise UnknownAdapter(f"expected {name}{SUFFIX} in the adapter directory, got none")
            await self._take(name, found[name])
        if failure := self._store.failure(name):
            raise RejectedAdapter(f"adapter {name!r} was rejected: {failure}")

    async def unload(self, name: str) -> None:
        """Stop serving a name until its file changes or `load` is called. Raises UnknownAdapter."""
        async with self._busy:
            self._store.get(name)
            self._store.retire(name)

    async def _consider(self, name: str, stamp: Stamp) -> None:
        now = time.monotonic()
        seen, since = self._seen.get(name, (None, now))
        if seen != stamp:
            self._seen[name] = (stamp, now)
            return
        waited = now - since
        complete = await asyncio.to_thread(_is_complete, self._file(name))
        if waited >= (SETTLE_SECONDS if complete else PATIENCE_SECONDS):
            await self._take(name, stamp)

    async def _take(self, name: str, stamp: Stamp) -> None:
        self._store.begin(name)
        try:
            loop = asyncio.get_running_loop()
            candidate = await loop.run_in_executor(self._loader, self._read, name, stamp)
        except (_Changing, FileNotFoundError):
            self._seen[name] = (stamp, time.monotonic())
            return
        except (DeltaError, OSError) as error:
            self._store.reject(name, str(error))
        except Exception as error:  # whatever one file does to us, the others are still taken up
            log.exception("reading adapter %s", name)
            self._store.reject(name, f"expected a readable file, got {type(error).__name__}")
        else:
            await self._store.publish(candidate)
        self._seen.pop(name, None)
        self._taken[name] = stamp

    def _read(self, name: str, stamp: Stamp) -> Candidate:
        with open(self._file(name), "rb") as file:
            payload = file.read()
            if Stamp.of(os.fstat(file.fileno())) != stamp:
                raise _Changing
        digest = hashlib.sha256(payload).hexdigest()
        adapter = read_delta(payload, self._base)
        return Candidate(name, digest, adapter.info, adapter.nnz, pack(adapter, self._dtype))

    def _scan(self) -> dict[str, Stamp]:
        found = {}
        with os.scandir(self._path) as entries:
            for entry in entries:
                name, suffix = os.path.splitext(entry.name)
                if suffix == SUFFIX and not name.startswith(".") and entry.is_file():
                    found[name] = Stamp.of(entry.stat())
        return found

    def _file(self, name: str) -> Path:
        return self._path / f"{name}{SUFFIX}"


def _is_complete(path: Path) -> bool:
    """Say whether a file is as long as its header declares; what is no delta file is complete."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            header = start + file.read(min(int.from_bytes(start, "little"), size))
        return size >= read_header(header).file_size
    except TruncatedDelta:
        return False
    except (DeltaError, OSError):
        return True
