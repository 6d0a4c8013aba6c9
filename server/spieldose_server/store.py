"""Which adapters are served under which names, and who uses them.

Every method runs on the event loop, which owns this state. Versions are immutable: replacing a file
publishes a new one, and the old one leaves when the last request that plays it is done.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

from spieldose_kernels.errors import DeltaError
from spieldose_server.config import DIGEST_SHOWN
from spieldose_server.errors import (
    AdapterTooLarge,
    RejectedAdapter,
    ServerError,
    UnknownAdapter,
    UnreadableAdapter,
)
from spieldose_server.files import FileChanged
from spieldose_server.residency import Residency, Superseded
from spieldose_server.versions import State, Version

log = logging.getLogger(__name__)

NOTICE_SECONDS = 5.0  # within which the directory notices what a failed read found out


class AdapterStore:
    """Publish, lease and retire adapter versions."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        residency.listen(self.changed)
        self._current: dict[str, Version] = {}  # what a request for the name gets
        self._newer: dict[str, Version] = {}  # the file after that: being validated, or rejected
        self._draining: list[Version] = []
        self._pinned: set[str] = set()  # names: a pin outlives the version
        self._watchers: set[Watcher] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself holds them weakly
        self._moved = asyncio.Event()  # replaced whenever a name gets another version

    def list(self) -> list[Version]:
        """Return every version the server knows, by name."""
        known = [*self._current.values(), *self._newer.values(), *self._draining]
        return sorted(known, key=lambda version: version.name)

    def states(self) -> dict[str, float]:
        """Return how many versions are in each state."""
        count = Counter(version.state for version in self.list())
        return {state.value: count[state] for state in State}

    def get(self, adapter_id: str) -> Version:
        """Return the version to show for a name, or NAME@DIGEST. Raises UnknownAdapter."""
        name, _, _ = adapter_id.partition("@")
        for versions in (self._current, self._newer):
            if name in versions and _matches(versions[name], adapter_id):
                return versions[name]
        raise UnknownAdapter(adapter_id)

    def newest(self, name: str) -> Version:
        """Return the version of a name's newest file, rejected or not. Raises UnknownAdapter."""
        version = self._newer.get(name) or self._current.get(name)
        if version is None:
            raise UnknownAdapter(name)
        return version

    @contextmanager
    def lease(self, adapter_id: str) -> Iterator["Lease | None"]:
        """Hold an adapter, None for the base, while the block runs, and begin to fetch it.

        Raises UnknownAdapter or RejectedAdapter.
        """
        if not adapter_id:
            yield None
            return
        lease = Lease(self, adapter_id)
        try:
            yield lease
        finally:
            lease.end()

    def resolve(self, adapter_id: str) -> Version:
        """Return what a request for NAME, or NAME@DIGEST, plays.

        A digest of DIGEST_SHOWN hex digits or more will do. Of a version that was never read in
        full the digest is not known yet. Raises UnknownAdapter or RejectedAdapter.
        """
        name, _, _ = adapter_id.partition("@")
        version = self._current.get(name)
        if version is None:
            newer = self._newer.get(name)
            if newer is not None and newer.state is State.REJECTED:
                raise RejectedAdapter(f"adapter {name!r} was rejected: {newer.reason}")
            raise UnknownAdapter(adapter_id)
        if not _matches(version, adapter_id):
            raise UnknownAdapter(adapter_id)
        return version

    async def load(self, version: Version) -> None:
        """Bring a version to the device; reject it if its file turns out to be no use.

        Raises Superseded, RejectedAdapter or UnreadableAdapter.
        """
        try:
            await self.residency.load(version)
        except (FileChanged, FileNotFoundError) as error:
            try:
                async with asyncio.timeout(NOTICE_SECONDS):
                    await self._noticed(version)
            except TimeoutError:
                raise UnreadableAdapter(
                    f"adapter {version.name!r} cannot be read: its file changed or vanished"
                ) from error
            raise Superseded from None
        except (DeltaError, AdapterTooLarge) as error:
            self.reject(version, str(error))
            raise RejectedAdapter(f"adapter {version.name!r} was rejected: {error}") from error
        except OSError as error:
            raise UnreadableAdapter(f"adapter {version.name!r} cannot be read: {error}") from error

    async def _noticed(self, version: Version) -> None:
        """Wait until the directory has seen that a version's file is another, or none.

        Raises RejectedAdapter if that is no use: then neither version is.
        """
        while not version.retired:
            newer = self._newer.get(version.name)
            if newer is not None and newer.state is State.REJECTED:
                self._retire(version.name)
                self._move()
                raise RejectedAdapter(f"adapter {version.name!r} was rejected: {newer.reason}")
            await self._moved.wait()

    def begin(self, version: Version) -> None:
        """Show a version that is being validated before it takes its name's place."""
        if current := self._current.get(version.name):
            version.signature = current.signature  # the content may be the same, too
        self._succeed(version.name, version)
        self.changed(version)

    def abandon(self, version: Version) -> None:
        """Forget a version that was begun: its file is changing still."""
        if self._newer.get(version.name) is version:
            self._succeed(version.name, None)

    def publish(self, version: Version) -> None:
        """Make a version what requests for its name get; the one before drains.

        The same content again changes nothing.
        """
        name = version.name
        current = self._current.get(name)
        if current is not None and current.digest and current.digest == version.digest:
            current.stamp, current.signature = version.stamp, version.signature
            self._succeed(name, None)
            self.residency.retire(version)  # there is one copy of a content
            self._move()
            return
        self._retire(name)
        self._succeed(name, None, published=version)
        version.pinned = name in self._pinned
        version.published = True
        self._current[name] = version
        self._move()
        self.changed(version)
        if version.pinned:
            self._load_aside(version)

    def reject(self, version: Version, reason: str) -> None:
        """Show why a version is not served; another one that is stays."""
        name = version.name
        if self._current.get(name) is version:
            del self._current[name]
            self.residency.retire(version)
        version.reason = reason
        self._succeed(name, version)
        log.warning("adapter %s rejected: %s", name, reason)
        self._move()
        self.changed(version)

    def retire(self, name: str) -> None:
        """Stop serving a name; running requests finish. Unknown names are no error."""
        self._succeed(name, None)
        self._retire(name)
        self._move()

    def pin(self, name: str, *, pinned: bool) -> bool:
        """Keep a name's versions on the device once they are there, or no longer.

        Returns whether that was otherwise before.
        """
        changed = (name in self._pinned) != pinned
        (self._pinned.add if pinned else self._pinned.discard)(name)
        if version := self._current.get(name):
            version.pinned = pinned
            self.residency.release(version)
            self.changed(version)
            if pinned:
                self._load_aside(version)
        return changed

    @contextmanager
    def watching(self) -> Iterator["Watcher"]:
        """Follow every version's state while the block runs, beginning with all there are."""
        watcher = Watcher()
        for version in self.list():
            watcher.tell(version, gone=False)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def close(self) -> None:
        """Let everyone who watches go."""
        for watcher in self._watchers:
            watcher.close()

    def changed(self, version: Version) -> None:
        """Tell watchers of a version's state, and forget it if it has drained."""
        if version.state is not State.DRAINING or version.leases:
            self._tell(version, gone=False)
        elif version in self._draining:
            self._draining.remove(version)
            self._tell(version, gone=True)

    def _load_aside(self, version: Version) -> None:
        """Bring a pinned version to the device without waiting for it."""

        async def load() -> None:
            with suppress(Superseded, ServerError):  # the last one has been logged and is shown
                await self.load(version)

        task = asyncio.create_task(load())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _succeed(
        self, name: str, version: Version | None, *, published: Version | None = None
    ) -> None:
        """Put a version, or none, after the current one; tell that what was there is gone."""
        before = self._newer.pop(name, None)
        if before is not None and before not in (version, published):
            self._tell(before, gone=True)
        if version is not None:
            self._newer[name] = version

    def _retire(self, name: str) -> None:
        if version := self._current.pop(name, None):
            self._draining.append(version)
            self.residency.retire(version)

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _tell(self, version: Version, *, gone: bool) -> None:
        for watcher in self._watchers:
            watcher.tell(version, gone=gone)


class Lease:
    """A request's hold on an adapter: of the version it plays, once that is on the device."""

    def __init__(self, store: AdapterStore, adapter_id: str) -> None:
        self._store = store
        self._id = adapter_id
        self._hold(store.resolve(adapter_id))

    async def ready(self) -> Version:
        """Wait until the adapter is on the device, and return the version that is held.

        One that is replaced before it gets there gives way to the newest. Raises UnknownAdapter,
        RejectedAdapter or UnreadableAdapter.
        """
        while True:
            with suppress(Superseded):
                await self._loading
                if self.version.playable:  # otherwise it had to leave meanwhile
                    break
            newest = self._store.resolve(
                self._id
            )  # if there is none, this one is still to be let go
            self.end()
            self._hold(newest)
        if not _matches(self.version, self._id):
            raise UnknownAdapter(self._id)
        return self.version

    def end(self) -> None:
        """Let go of the version."""
        self._loading.cancel()
        if self._loading.done() and not self._loading.cancelled():
            self._loading.exception()  # who does not wait does not care
        self.version.leases -= 1
        self._store.residency.release(self.version)
        self._store.changed(self.version)

    def _hold(self, version: Version) -> None:
        self.version = version
        version.leases += 1
        self._loading = asyncio.create_task(self._store.load(version))


class Watcher:
    """Gather what changes until it is asked for; of one version the newest state only."""

    def __init__(self) -> None:
        self._closed = False
        self._news: dict[Version, bool] = {}
        self._known: set[Version] = set()  # to who iterates
        self._some = asyncio.Event()

    def tell(self, version: Version, *, gone: bool) -> None:
        """Take note of a change, if it is one for whoever iterates: that need not keep up."""
        if gone and version not in self._known:
            self._news.pop(version, None)
            return
        self._news[version] = gone
        self._some.set()

    def close(self) -> None:
        """End the iteration, after what was told so far."""
        self._closed = True
        self._some.set()

    async def __aiter__(self) -> AsyncIterator[tuple[Version, bool]]:
        """Yield versions that changed, and whether the server has forgotten them."""
        while self._news or not self._closed:
            await self._some.wait()
            self._some.clear()
            news, self._news = self._news, {}
            self._known = {
                version for version in self._known | news.keys() if not news.get(version)
            }
            for version, gone in news.items():
                yield version, gone


def _matches(version: Version, adapter_id: str) -> bool:
    """Say whether a version is what NAME or NAME@DIGEST asks for, as far as that is known."""
    _, at, digest = adapter_id.partition("@")
    if not at:
        return True
    return len(digest) >= DIGEST_SHOWN and (not version.digest or version.digest.startswith(digest))
