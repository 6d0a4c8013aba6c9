"""One version of one adapter: an immutable file content, and how far it has come in."""

import enum
from dataclasses import dataclass

from spieldose_kernels.signature import Signature
from spieldose_server.config import DIGEST_SHOWN
from spieldose_server.files import Description, FileStamp


class State(enum.Enum):
    """How far a version has come, or why it is still here."""

    FOUND = "found"  # its header is valid
    VALIDATING = "validating"  # all of it is being read for the first time
    ON_HOST = "on host"  # packed in host memory
    LOADING = "loading"  # on its way to the device
    RESIDENT = "resident"
    DRAINING = "draining"  # replaced or removed; running requests finish on it
    REJECTED = "rejected"


@dataclass(eq=False, slots=True, kw_only=True)
class Version:
    """Hold one version. Everything in it belongs to the event loop."""

    name: str
    stamp: FileStamp | None = None  # of the file it is read from; None if it could not be read
    description: Description | None = None
    digest: str = ""  # sha256 of the file, hex; empty until all of it was read
    signature: Signature | None = None  # that vouches for its content, if one has to
    reason: str = ""  # why it is rejected
    published: bool = False  # requests may get it
    retired: bool = False  # another version, or none, has taken its place

    reading: bool = False  # its file is being read
    on_host: bool = False
    awaited: bool = False  # by the device
    slot: int | None = None  # on the device
    nbytes: int = 0  # of device memory; 0 until it was packed

    pinned: bool = False  # not evicted
    leases: int = 0  # requests that wait for it or play it
    playing: int = 0  # those in the engine
    played: bool = False  # since it came to the device
    leaving: bool = False  # no further request plays it: its room is wanted

    @property
    def state(self) -> State:
        """Return how far it has come."""
        if self.reason:
            return State.REJECTED
        if self.retired:
            return State.DRAINING
        if self.slot is not None:
            return State.RESIDENT
        if not self.published or (self.reading and not self.digest):
            return State.VALIDATING
        if self.awaited:
            return State.LOADING
        return State.ON_HOST if self.on_host else State.FOUND

    @property
    def playable(self) -> bool:
        """Say whether a request may begin to play it."""
        return self.slot is not None and not (self.leaving or self.retired)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:DIGEST_SHOWN]}" if self.digest else self.name
