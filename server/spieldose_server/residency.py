"""Where adapters' tensors are: on disk, packed in host memory, in the device's slots.

The event loop decides, workers read and copy. Both tiers are budgeted in bytes and evict what was
used least recently. Host memory is a cache: losing a copy costs another read. A slot that a request
plays is never taken away, nor is a pinned one. When all slots are in use and another adapter waits,
the one that came first must leave: it finishes what it plays, and those who still wait for it queue
again. None has to before it has played.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import TypeVar

from spieldose_kernels.errors import ArenaFull
from spieldose_kernels.slab import Slab
from spieldose_kernels.sliced import PackedAdapter
from spieldose_server.errors import AdapterTooLarge, NoRoom
from spieldose_server.files import AdapterFiles, Content, FileChanged
from spieldose_server.threads import LOADERS
from spieldose_server.versions import Version

log = logging.getLogger(__name__)

T = TypeVar("T")


class Superseded(Exception):
    """The version did not come to the device: it was replaced or removed, or nobody needs it."""


class Residency:
    """Bring versions up to the device and make room for them."""

    def __init__(
        self,
        slab: Slab,
        files: AdapterFiles,
        workers: Executor,
        *,
        host_memory: int,  # bytes
    ) -> None:
        self._slab = slab
        self._files = files
        self._workers = workers
        self.host_memory = host_memory
        self._changed: Callable[[Version], None] = lambda _: None
        self._dismiss: Callable[[Version], None] = lambda _: None
        self._host: OrderedDict[Version, PackedAdapter] = OrderedDict()  # least recently used first
        self._resident: OrderedDict[Version, None] = OrderedDict()  # the same
        self._arrived: dict[Version, None] = {}  # those on the device, in the order they came
        self._reads: dict[Version, asyncio.Task[PackedAdapter]] = {}
        self._loads: dict[Version, asyncio.Task[None]] = {}
        self._readers = asyncio.Semaphore(LOADERS)
        self._turn = asyncio.Lock()  # whoever was read first gets room first
        self._freed = asyncio.Event()
        self.evictions = 0
        self.found = Counter(device=0, host=0, disk=0)  # where versions were when needed
        self.loaded: Callable[[float], None] = lambda _: None  # told the seconds of every load

    def listen(self, changed: Callable[[Version], None]) -> None:
        """Have every new state of a version told."""
        self._changed = changed

    def dismiss_by(self, dismiss: Callable[[Version], None]) -> None:
        """Have those who wait to play a version sent away when it has to leave."""
        self._dismiss = dismiss

    @property
    def host_bytes(self) -> int:
        """Return how much host memory packed adapters take."""
        held = tuple(self._host.values())  # in one piece: who scrapes metrics is another thread
        return sum(packed.host_bytes for packed in held)

    async def load(self, version: Version) -> None:
        """Wait until a version is on the device, to stay until it has played.

        Raises Superseded if it was replaced or nobody needs it any more; FileChanged, OSError,
        DeltaError or AdapterTooLarge if its file is no use.
        """
        self.found["device" if version.playable else "host" if version.on_host else "disk"] += 1
        while version.slot is None or version.leaving:
            await _shared(self._loads, version, self._load)
        self._resident.move_to_end(version)

    async def read(self, version: Version) -> PackedAdapter:
        """Return a version as it is in host memory, from its file if it is not there."""
        if packed := self._host.get(version):
            self._host.move_to_end(version)
            return packed
        return await _shared(self._reads, version, self._read)

    def keep(self, version: Version, content: Content) -> None:
        """Put what was read into host memory, if that is large enough. Raises AdapterTooLarge."""
        size, room = content.packed.nbytes, self._slab.budget
        if size > room:
            raise AdapterTooLarge(
                f"expected an adapter that takes at most {room} bytes of adapter memory, got {size}"
            )
        version.digest, version.description = content.digest, content.description
        version.signature = content.description.signature
        version.nbytes = size
        if content.packed.host_bytes <= self.host_memory and not version.retired:
            self._host[version] = content.packed
            version.on_host = True
            while self.host_bytes > self.host_memory:
                self._forget(next(iter(self._host)))
        self._changed(version)

    async def offer(self, version: Version) -> None:
        """Put a version on the device if there is room, for which nothing has to leave or wait."""
        packed = self._host.get(version)
        if packed is None or version.slot is not None or self._turn.locked():
            return
        async with self._turn:
            with suppress(ArenaFull):
                await self._put(version, packed)

    def release(self, version: Version) -> None:
        """Take note that fewer requests use a version; free it if it has to leave and can."""
        must_leave = version.retired or version.leaving
        if version.slot is not None and must_leave and version.playing == 0:
            self.evictions += not version.retired
            self._unload(version)
        self._freed.set()

    def retire(self, version: Version) -> None:
        """Let go of a version as soon as no request plays it any more."""
        version.retired = True
        self._dismiss(version)
        self._forget(version)
        self.release(version)
        self._freed.set()  # whoever waits for room for it waits no longer
        self._changed(version)

    async def _read(self, version: Version) -> PackedAdapter:
        assert version.stamp is not None
        version.reading = True
        self._changed(version)
        try:
            loop = asyncio.get_running_loop()
            content = await loop.run_in_executor(
                self._workers, self._files.read, version.name, version.stamp, version.signature
            )
        finally:
            version.reading = False
        if version.digest and content.digest != version.digest:
            raise FileChanged  # and it was done without a trace
        self.keep(version, content)
        return content.packed

    async def _load(self, version: Version) -> None:
        began = time.perf_counter()
        version.awaited = True
        try:
            async with self._readers:  # as many as there are workers: the others may give up
                _check_needed(version)
                await self.read(version)
            async with self._turn:
                # again, because it may have been evicted since: waiting versions fill no memory
                await self._place(version, await self.read(version))
            self.loaded(time.perf_counter() - began)
        finally:
            version.awaited = False
            self._changed(version)

    async def _place(self, version: Version, packed: PackedAdapter) -> None:
        """Copy a version to the device, once there is room."""
        try:
            while version.slot is None:
                _check_needed(version)
                self._freed.clear()
                try:
                    await self._put(version, packed)
                except ArenaFull:
                    self._check_room(version)
                    if not self._evict():
                        self._ask_to_leave()
                        await self._freed.wait()
        finally:
            for resident in self._resident:
                resident.leaving = False  # nobody needs its room any more

    async def _put(self, version: Version, packed: PackedAdapter) -> None:
        loop = asyncio.get_running_loop()
        version.slot = await loop.run_in_executor(self._workers, self._slab.put, packed)
        self._resident[version] = None
        self._arrived[version] = None
        version.played = version.leaving = False
        log.info("adapter %s is resident", version)
        self._changed(version)
        self.release(version)  # it may have lost its last request, or its file, meanwhile

    def _check_room(self, version: Version) -> None:
        """Raise NoRoom if what is pinned leaves too little, whatever else leaves."""
        pinned = [held for held in self._resident if held.pinned and not held.retired]
        left = self._slab.budget - sum(held.nbytes for held in pinned)
        alone = len(pinned) in (self._slab.slots, len(self._resident))
        if pinned and (alone or left < version.nbytes):
            raise NoRoom(
                f"adapter {version.name!r}: expected {version.nbytes} bytes in one piece and a "
                f"slot beside {len(pinned)} pinned adapters, got {left} bytes"
            )

    def _evict(self) -> bool:
        """Free the slot that was used least recently of those nobody needs, if there is one."""
        for version in self._resident:
            if version.leases == version.playing == 0 and not version.pinned:
                self._unload(version)
                self.evictions += 1
                return True
        return False

    def _ask_to_leave(self) -> None:
        """Have the version leave that came first of those that have played; one at a time."""
        if any(version.leaving for version in self._arrived):
            return
        for version in self._arrived:
            if version.played and not version.pinned and not version.retired:
                version.leaving = True
                self._dismiss(version)
                self.release(version)
                return

    def _unload(self, version: Version) -> None:
        assert version.slot is not None
        self._slab.remove(version.slot)
        version.slot = None
        del self._resident[version], self._arrived[version]
        self._freed.set()
        log.info("adapter %s has left the device", version)
        self._changed(version)

    def _forget(self, version: Version) -> None:
        if self._host.pop(version, None) is not None:
            version.on_host = False
            self._changed(version)


def _check_needed(version: Version) -> None:
    """Raise Superseded if nobody is to play a version any more."""
    if version.retired or not (version.leases or version.pinned):
        raise Superseded


async def _shared(
    tasks: dict[Version, asyncio.Task[T]], version: Version, work: Callable[[Version], Awaitable[T]]
) -> T:
    """Wait for work on a version that is done once for all who wait; a waiter's end is not its."""

    async def run() -> T:
        return await work(version)

    def forget(task: asyncio.Task[T]) -> None:
        del tasks[version]
        if not task.cancelled():
            task.exception()  # whoever still waits is told

    task = tasks.get(version)
    if task is None:
        task = tasks[version] = asyncio.create_task(run())
        task.add_done_callback(forget)
    return await asyncio.shield(task)
