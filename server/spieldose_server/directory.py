"""The adapter directory: new files are taken up, changed ones replaced, removed ones retired.

At start headers are read, nothing more. Afterwards a file is validated as a whole before it is
served: once it is complete (as long as its header declares) and has not changed for a moment. One
that stays incomplete is rejected. Files are read on worker threads.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from watchfiles import awatch

from spieldose_kernels.delta_file import SUFFIX
from spieldose_kernels.errors import DeltaError, TruncatedDelta, UntrustedDelta
from spieldose_server.errors import (
    AdapterTooLarge,
    NoSuchFile,
    RejectedAdapter,
    UnreadableAdapter,
)
from spieldose_server.files import AdapterFiles, Description, FileChanged, FileStamp
from spieldose_server.store import AdapterStore
from spieldose_server.trusted_keys import TrustedKeys
from spieldose_server.versions import State, Version

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2  # a file unchanged for so long, and complete, is read
PATIENCE_SECONDS = 3.0  # an incomplete file unchanged for so long is not being written any more
RESCAN_MILLISECONDS = 1000  # for file systems that report no events
HEADERS_AT_ONCE = 64

Found = Sequence[tuple[str, FileStamp]]


class AdapterDirectory:
    """Keep the store in step with a directory of delta files."""

    def __init__(
        self,
        files: AdapterFiles,
        store: AdapterStore,
        workers: Executor,
        *,
        keys: TrustedKeys | None = None,
    ) -> None:
        self._files = files
        self._keys = keys
        self._trusted = keys.current() if keys else ()
        self._store = store
        self._workers = workers
        # None: it is looked at again
        self._taken: dict[
            str, FileStamp | None
        ] = {}  # the file state last published, rejected or unloaded
        self._seen: dict[str, tuple[FileStamp, float]] = {}  # not yet settled, and since when
        self._busy = asyncio.Lock()  # one file at a time
        self._loading: set[asyncio.Task[None]] = set()  # by call
        self._there = True

    async def take_up(self) -> None:
        """List every file that lies in the directory now, by its header alone. Raises OSError."""
        found = list((await asyncio.to_thread(self._files.scan)).items())
        now = time.time_ns()
        settled = [
            (name, stamp)
            for name, stamp in found
            if stamp.modified < now - SETTLE_SECONDS * 1e9  # the others are watched
        ]
        loop = asyncio.get_running_loop()
        for start in range(0, len(settled), HEADERS_AT_ONCE):
            part = settled[start : start + HEADERS_AT_ONCE]
            for name, stamp, outcome in await loop.run_in_executor(
                self._workers, self._describe, part
            ):
                version = Version(name=name, stamp=stamp)
                if isinstance(outcome, Description):
                    version.description, version.signature = outcome, outcome.signature
                    self._store.publish(version)
                else:
                    self._store.reject(version, outcome)
                self._taken[name] = stamp
        if len(self._taken) < len(found):
            await self.reconcile()
            await asyncio.sleep(SETTLE_SECONDS)
            await self.reconcile()

    async def watch(self) -> None:
        """Follow the directory until cancelled; one that vanishes may come back."""
        while True:
            try:
                async for _ in awatch(
                    self._files.root,
                    watch_filter=None,
                    recursive=False,
                    debounce=50,
                    step=25,
                    rust_timeout=RESCAN_MILLISECONDS,
                    yield_on_timeout=True,
                ):
                    while await self.reconcile():
                        await asyncio.sleep(SETTLE_SECONDS)
                    if not self._there:
                        break  # what is watched is gone even if the path comes back
            except (OSError, RuntimeError, ExceptionGroup) as error:
                # of a name that is not UTF-8, for one, or of too few inotify instances
                log.warning("adapter directory: %r", error)
            await asyncio.sleep(RESCAN_MILLISECONDS / 1000)
            await self.reconcile()

    async def reconcile(self) -> bool:
        """Compare the directory with what is known; return whether a file has yet to settle.

        It does not go on for long: files and keys that go meanwhile count soon, however many came.
        While the directory itself is not there, everything stays as it is.
        """
        began = time.monotonic()
        self._judge()
        try:
            found = await asyncio.to_thread(self._files.scan)
        except OSError as error:
            if self._there:
                log.warning("adapter directory: %s; serving what there was", error)
            self._there = False
            return False
        self._there = True
        for name in self._taken.keys() - found.keys():
            del self._taken[name]
            self._store.retire(name)
        changed = {name: s for name, s in found.items() if s != self._taken.get(name)}
        self._seen = {name: seen for name, seen in self._seen.items() if name in changed}
        for name, stamp in changed.items():
            async with self._busy:
                await self._consider(name, stamp)
            if time.monotonic() - began > RESCAN_MILLISECONDS / 1000:
                return True
        return bool(self._seen)

    async def load(self, name: str) -> None:
        """Take up a file now. Raises NoSuchFile if it is not there, RejectedAdapter if bad.

        Once begun it is done, also if who asked goes away.
        """

        def forget(task: asyncio.Task[None]) -> None:
            self._loading.discard(task)
            if not task.cancelled():
                task.exception()  # whoever still waits is told

        task = asyncio.create_task(self._load(name))
        self._loading.add(task)
        task.add_done_callback(forget)
        await asyncio.shield(task)

    async def _load(self, name: str) -> None:
        async with self._busy:
            try:
                found = await asyncio.to_thread(self._files.scan)
            except OSError as error:
                raise UnreadableAdapter(f"expected the adapter directory, got: {error}") from error
            if name not in found:
                raise NoSuchFile(f"expected {name}{SUFFIX} in the adapter directory, got none")
            if not await self._take(name, found[name]):
                raise UnreadableAdapter(f"expected a file at rest, got {name}{SUFFIX} changing")
        newest = self._store.newest(name)
        if newest.state is State.REJECTED:
            raise RejectedAdapter(f"adapter {name!r} was rejected: {newest.reason}")

    async def unload(self, name: str) -> None:
        """Stop serving a name until its file changes or `load` is called. Raises UnknownAdapter."""
        async with self._busy:
            self._store.newest(name)
            self._store.retire(name)

    def _judge(self) -> None:
        """Withdraw what no trusted key vouches for any longer; look again at what was rejected."""
        if self._keys is None or self._trusted == (trusted := self._keys.current()):
            return
        self._trusted = trusted
        for version in self._store.list():
            if version.state is State.REJECTED:
                self._taken[version.name] = None
            elif version.published and not version.retired:
                try:
                    self._keys.check(version.signature)
                except UntrustedDelta as error:
                    self._store.reject(version, str(error))
                    self._taken[version.name] = None  # it may be signed anew by now

    async def _consider(self, name: str, stamp: FileStamp) -> None:
        now = time.monotonic()
        seen, since = self._seen.get(name, (None, now))
        if seen != stamp:
            self._seen[name] = (stamp, now)
            return
        complete = await asyncio.to_thread(self._files.is_complete, name)
        if now - since >= (SETTLE_SECONDS if complete else PATIENCE_SECONDS):
            await self._take(name, stamp)

    async def _take(self, name: str, stamp: FileStamp) -> bool:
        """Publish or reject what a file holds; return whether it kept still for that."""
        version = Version(name=name, stamp=stamp)
        self._store.begin(version)
        try:
            await self._store.residency.read(version)
        except (FileChanged, FileNotFoundError):
            self._store.abandon(version)
            self._seen[name] = (stamp, time.monotonic())
            return False
        except (DeltaError, AdapterTooLarge, OSError) as error:
            self._store.reject(version, str(error))
        except asyncio.CancelledError:
            self._store.abandon(version)
            raise
        except Exception as error:  # whatever one file does to us, the others are still taken up
            log.exception("reading adapter %s", name)
            self._store.reject(version, f"expected a readable file, got {type(error).__name__}")
        else:
            self._store.publish(version)
            await self._store.residency.offer(version)
        self._seen.pop(name, None)
        self._taken[name] = stamp
        return True

    def _describe(self, found: Found) -> list[tuple[str, FileStamp, Description | str]]:
        """Return what each file's header says, or why it is rejected; none for those in flux."""
        outcomes: list[tuple[str, FileStamp, Description | str]] = []
        for name, stamp in found:
            try:
                outcomes.append((name, stamp, self._files.describe(name, stamp)))
            except (FileChanged, FileNotFoundError, TruncatedDelta):
                continue
            except (DeltaError, OSError) as error:
                outcomes.append((name, stamp, str(error)))
        return outcomes
