"""What takes time before a request waits for its turn, on threads of its own.

Tokenising a megabyte takes a second, and cannot be broken off. So each tenant has a share of the
threads, and what is cancelled gives its place back when it is done.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

TENANT_WORKERS = 2  # threads that one tenant may use at once
WORKERS = TENANT_WORKERS * max(4, os.cpu_count() or 1)


class Preparation:
    """Do tenants' work aside, a few things at a time for each; belongs to the event loop."""

    def __init__(self) -> None:
        self._workers = ThreadPoolExecutor(WORKERS, "prepare")
        self._places: dict[str, asyncio.Semaphore] = {}  # of tenants with work
        self._work: Counter[str] = Counter()  # that waits or goes on, by tenant

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Return what work returns; it begins when one of its tenant's places is free."""
        self._work[tenant] += 1
        places = self._places.setdefault(tenant, asyncio.Semaphore(TENANT_WORKERS))
        try:
            await places.acquire()
        except asyncio.CancelledError:
            self._leave(tenant)
            raise
        done = asyncio.get_running_loop().run_in_executor(self._workers, work)
        done.add_done_callback(lambda done: self._end(tenant, done))
        return await asyncio.shield(done)

    def _end(self, tenant: str, done: "asyncio.Future[T]") -> None:
        if not done.cancelled():
            done.exception()  # whoever still waits is told
        self._places[tenant].release()
        self._leave(tenant)

    def _leave(self, tenant: str) -> None:
        self._work[tenant] -= 1
        if not self._work[tenant]:
            del self._work[tenant], self._places[tenant]
