"""Who may enter the engine next: fair turns between tenants, and between a tenant's adapters.

Each tenant has a counter of the tokens it was served, and so has each adapter within its tenant; a
free place goes to the tenant with the lowest, there to the adapter with the lowest, there to who
came first (virtual token counters, Sheng et al., arXiv 2401.00588). Whoever was away begins at the
lowest of those who are there: absence earns nothing, and forgives nothing. The base is an adapter
like any other. Only requests whose adapter is on the device take part, so that one that loads
blocks nobody.

Everything here runs on the event loop.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from spieldose_server.errors import Busy
from spieldose_server.residency import Residency
from spieldose_server.store import Lease
from spieldose_server.versions import Version

BURST_SECONDS = 10.0  # of a tenant's tokens a second may be used at once
MIN_RETRY, MAX_RETRY = 0.1, 60.0  # seconds that those turned away are told to wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Hold how much may be asked at once."""

    running: int  # requests in the engine
    accepted: int  # requests in the engine or waiting
    tenant_running: int
    tenant_accepted: int
    tenant_tokens_per_second: float  # 0: no limit


class Dismissed(Exception):
    """The adapter had to leave the device before it was this request's turn."""


@dataclass(eq=False, slots=True)
class Share:
    """Hold what one adapter of a tenant was served, and who waits for it."""

    served: float = 0.0  # tokens
    running: int = 0
    queue: "OrderedDict[asyncio.Future[None], Turn]" = field(default_factory=OrderedDict)


@dataclass(eq=False, slots=True)
class Tenant:
    """Hold what a tenant was served and what it has here."""

    served: float = 0.0  # tokens
    accepted: int = 0
    running: int = 0
    shares: dict[str, Share] = field(default_factory=dict)  # by adapter; "" is the base
    allowance: float = 0.0  # tokens it may use at once; below 0 it has to wait
    refilled: float = field(default_factory=time.monotonic)  # when

    @property
    def waits(self) -> bool:
        """Say whether a request of it waits for its turn."""
        return any(share.queue for share in self.shares.values())

    def refill(self, rate: float) -> None:
        """Add what time has brought, at `rate` tokens a second."""
        now = time.monotonic()
        gained = (now - self.refilled) * rate
        self.allowance = min(self.allowance + gained, rate * BURST_SECONDS)
        self.refilled = now

    def forget(self) -> None:
        """Drop its adapters' counters that say nothing any more."""
        lowest = min((s.served for s in self.shares.values() if s.queue), default=math.inf)
        for adapter, share in list(self.shares.items()):
            if not share.queue and not share.running and share.served <= lowest:
                del self.shares[adapter]


@dataclass(frozen=True, slots=True)
class Turn:
    """Hold a place in the engine."""

    tenant: Tenant
    share: Share
    tokens: int  # of the prompt
    version: Version | None  # what plays; None: the base
    ready: int  # when that was on the device, by time.perf_counter_ns

    def charge(self, tokens: int) -> None:
        """Count tokens as served."""
        self.tenant.served += tokens
        self.share.served += tokens
        self.tenant.allowance -= tokens


class Admission:
    """Give out the engine's places."""

    def __init__(self, limits: Limits, residency: Residency) -> None:
        self._limits = limits
        self._residency = residency
        self._tenants: dict[str, Tenant] = {}
        self.running = 0
        self.accepted = 0
        self._pace = 0.0  # seconds between two requests that end, smoothed
        self._ended = time.monotonic()
        residency.dismiss_by(self._dismiss)

    @property
    def most(self) -> int:
        """Return how many requests of one tenant are accepted if nobody else asks."""
        return min(self._limits.accepted, self._limits.tenant_accepted)

    @contextmanager
    def accept(self, name: str) -> Iterator[Tenant]:
        """Count a tenant's request as here while the block runs.

        Raises Busy if there are too many, or if the tenant has used up its tokens.
        """
        tenant = self._tenant(name)
        self.accepted += 1
        tenant.accepted += 1
        try:
            yield tenant
        finally:
            self.accepted -= 1
            tenant.accepted -= 1
            self._forget()

    @asynccontextmanager
    async def turn(
        self, tenant: Tenant, lease: Lease | None, *, tokens: int
    ) -> AsyncIterator[Turn]:
        """Hold a place for a request with a prompt of `tokens` while the block runs.

        Waits for the adapter to be on the device and for the request's turn. Raises what
        `Lease.ready` raises.
        """
        turn = await self._wait(tenant, lease, tokens)
        try:
            yield turn
        finally:
            self._leave(turn)

    def _tenant(self, name: str) -> Tenant:
        """Return a tenant that may ask for more. Raises Busy."""
        limits = self._limits
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = Tenant(allowance=limits.tenant_tokens_per_second * BURST_SECONDS)
        if self.accepted >= limits.accepted:
            raise Busy(f"expected at most {limits.accepted} requests at once", retry=self._retry())
        if tenant.accepted >= limits.tenant_accepted:
            raise Busy(
                f"expected at most {limits.tenant_accepted} requests of a tenant at once",
                retry=self._retry(),
            )
        if rate := limits.tenant_tokens_per_second:
            tenant.refill(rate)
            if tenant.allowance < 0:
                raise Busy(
                    f"expected at most {rate:g} tokens a second of a tenant",
                    retry=_clamped(-tenant.allowance / rate),
                )
        self._tenants[name] = tenant
        return tenant

    async def _wait(self, tenant: Tenant, lease: Lease | None, tokens: int) -> Turn:
        """Wait for the adapter and for a place, and take it."""
        while True:
            version = None if lease is None else await lease.ready()
            share = self._join(tenant, "" if version is None else version.name)
            turn = Turn(tenant, share, tokens, version, time.perf_counter_ns())
            place = asyncio.get_running_loop().create_future()
            share.queue[place] = turn
            self._advance()
            try:
                await place
            except Dismissed:
                continue
            except asyncio.CancelledError:
                share.queue.pop(place, None)
                if place.done() and not place.cancelled() and place.exception() is None:
                    self._leave(turn)  # its turn came before the cancellation
                raise
            return turn

    def _join(self, tenant: Tenant, adapter: str) -> Share:
        """Return an adapter's share; counters of who was away begin at the lowest of the others."""
        if not tenant.waits and not tenant.running:
            others = [t.served for t in self._tenants.values() if t.waits or t.running]
            tenant.served = max(tenant.served, min(others, default=0.0))
        share = tenant.shares.setdefault(adapter, Share())
        if not share.queue:
            others = [s.served for s in tenant.shares.values() if s.queue]
            share.served = max(share.served, min(others, default=0.0))
        return share

    def _advance(self) -> None:
        """Give free places to those whose turn it is.

        A prompt counts at once: the next of several places that are free goes to somebody else.
        """
        if self.running == 0:
            self._ended = time.monotonic()  # idle time is no pace
        while self.running < self._limits.running and (chosen := self._next()) is not None:
            place, turn = chosen.queue.popitem(last=False)
            if place.cancelled():
                continue  # whoever waited is gone, but its task has yet to run
            self.running += 1
            turn.tenant.running += 1
            turn.share.running += 1
            turn.charge(turn.tokens)
            if turn.version is not None:
                turn.version.playing += 1
                turn.version.played = True
            place.set_result(None)

    def _next(self) -> Share | None:
        """Return whose turn it is: the least served tenant's least served adapter."""
        for tenant in sorted(self._tenants.values(), key=lambda tenant: tenant.served):
            if tenant.running < self._limits.tenant_running:
                waiting = [share for share in tenant.shares.values() if share.queue]
                if waiting:
                    return min(waiting, key=lambda share: share.served)
        return None

    def _leave(self, turn: Turn) -> None:
        """Give a place back, and away."""
        self.running -= 1
        turn.tenant.running -= 1
        turn.share.running -= 1
        now = time.monotonic()
        self._pace = 0.9 * self._pace + 0.1 * (now - self._ended)
        self._ended = now
        if turn.version is not None:
            turn.version.playing -= 1
            self._residency.release(turn.version)
        self._advance()

    def _dismiss(self, version: Version) -> None:
        """Send those away who wait to play a version."""
        for tenant in self._tenants.values():
            if share := tenant.shares.get(version.name):
                for place, turn in list(share.queue.items()):
                    if turn.version is version:
                        del share.queue[place]
                        if not place.cancelled():
                            place.set_exception(Dismissed())

    def _forget(self) -> None:
        """Drop the counters that say nothing any more: those no higher than the lowest in use."""
        present = [tenant.served for tenant in self._tenants.values() if tenant.accepted]
        lowest, rate = min(present, default=math.inf), self._limits.tenant_tokens_per_second
        for name, tenant in list(self._tenants.items()):
            if tenant.accepted or tenant.served > lowest:
                tenant.forget()
                continue
            if rate:
                tenant.refill(rate)
            if not rate or tenant.allowance == rate * BURST_SECONDS:
                del self._tenants[name]

    def _retry(self) -> float:
        """Return in how many seconds a request should be accepted, at the pace of late."""
        return _clamped(self._pace * max(1, self.accepted - self.running))


def _clamped(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY), MAX_RETRY)
