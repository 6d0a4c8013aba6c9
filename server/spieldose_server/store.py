"""Which adapters are served, who holds them, and which leaves next.

Every method runs on the event loop, which owns this state; only copying tensors happens elsewhere.
Versions are immutable: replacing a file publishes a new one, and the old one leaves when the last
request that began on it is done.
"""

import asyncio
import enum
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from spieldose_kernels.delta import AdapterInfo
from spieldose_kernels.errors import ArenaFull
from spieldose_kernels.slab import Slab
from spieldose_kernels.sliced import PackedAdapter
from spieldose_server.errors import RejectedAdapter, UnknownAdapter

log = logging.getLogger(__name__)


class State(enum.Enum):
    """Where an adapter version is in its life."""

    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"
    REJECTED = "rejected"


@dataclass(eq=False, slots=True, kw_only=True)
class Version:
    """Hold one version of one adapter."""

    name: str
    state: State
    digest: str = ""  # sha256 of the file, hex; empty until it is read
    info: AdapterInfo | None = None
    reason: str = ""  # why it was rejected
    nnz: int = 0
    nbytes: int = 0  # of the arena
    slot: int | None = None  # while resident or draining
    leases: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """Hold a validated adapter, packed and ready to be published."""

    name: str
    digest: str
    info: AdapterInfo
    nnz: int
    packed: PackedAdapter


class AdapterStore:
    """Publish, lease and retire adapter versions."""

    def __init__(self, slab: Slab, loader: Executor) -> None:
        self._slab = slab
        self._loader = loader
        self._current: dict[str, Version] = {}  # what a request for the name gets
        self._failed: dict[str, Version] = {}  # the newest file of the name, if it was rejected
        self._loading: dict[str, Version] = {}
        self._draining: list[Version] = []

    def list(self) -> list[Version]:
        """Return every version the server knows, by name."""
        groups = (self._current, self._failed, self._loading)
        known = [version for group in groups for version in group.values()] + self._draining
        return sorted(known, key=lambda version: version.name)

    def get(self, name: str) -> Version:
        """Return the version to show for a name. Raises UnknownAdapter."""
        for group in (self._current, self._loading, self._failed):
            if name in group:
                return group[name]
        raise UnknownAdapter(f"expected a served adapter, got {name!r}")

    def failure(self, name: str) -> str | None:
        """Return why the newest file of a name is not served, None if it is."""
        failed = self._failed.get(name)
        return None if failed is None else failed.reason

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Version | None]:
        """Hold the newest version of an adapter, None for the base, while the block runs.

        Raises UnknownAdapter or RejectedAdapter.
        """
        if not name:
            yield None
            return
        version = self._current.get(name)
        if version is None:
            if failure := self.failure(name):
                raise RejectedAdapter(f"adapter {name!r} was rejected: {failure}")
            raise UnknownAdapter(f"expected a served adapter, got {name!r}")
        version.leases += 1
        try:
            yield version
        finally:
            version.leases -= 1
            self._collect()

    def begin(self, name: str) -> None:
        """Show that a file of this name is being read."""
        self._loading[name] = Version(name=name, state=State.LOADING)

    async def publish(self, candidate: Candidate) -> None:
        """Make a version the newest of its name; the one before drains.

        The same content again changes nothing. Rejects it if the adapter memory is full.
        """
        name, digest = candidate.name, candidate.digest
        current = self._current.get(name)
        if current is None or current.digest != digest:
            try:
                loop = asyncio.get_running_loop()
                slot = await loop.run_in_executor(self._loader, self._slab.put, candidate.packed)
            except ArenaFull as error:
                self.reject(name, f"adapter memory is full: {error}", digest=digest)
                return
            self._drain(name)
            self._current[name] = Version(
                name=name,
                state=State.RESIDENT,
                digest=digest,
                info=candidate.info,
                nnz=candidate.nnz,
                nbytes=candidate.packed.nbytes,
                slot=slot,
            )
            log.info("adapter %s@%s is resident", name, digest[:12])
        self._loading.pop(name, None)
        self._failed.pop(name, None)

    def reject(self, name: str, reason: str, *, digest: str = "") -> None:
        """Show why the newest file of a name is not served; a version already served stays."""
        self._loading.pop(name, None)
        self._failed[name] = Version(name=name, state=State.REJECTED, digest=digest, reason=reason)
        log.warning("adapter %s rejected: %s", name, reason)

    def retire(self, name: str) -> None:
        """Stop serving a name; running requests finish. Unknown names are no error."""
        self._loading.pop(name, None)
        self._failed.pop(name, None)
        self._drain(name)

    def _drain(self, name: str) -> None:
        if version := self._current.pop(name, None):
            version.state = State.DRAINING
            self._draining.append(version)
            self._collect()

    def _collect(self) -> None:
        """Give back the memory of drained versions nobody holds."""
        for version in [v for v in self._draining if v.leases == 0]:
            self._draining.remove(version)
            assert version.slot is not None
            self._slab.remove(version.slot)
            log.info("adapter %s@%s is unloaded", version.name, version.digest[:12])
