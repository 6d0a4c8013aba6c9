"""Tenants' work aside: a share of the threads for each, and nothing is broken off halfway."""

import asyncio
import threading
import time
from itertools import count

import pytest

from spieldose_server.preparation import TENANT_WORKERS, Preparation
from spieldose_server.time_limit import within


def test_a_tenants_flood_leaves_threads_to_the_others() -> None:
    async def run() -> None:
        preparation, gate = Preparation(), threading.Event()
        flood = [
            asyncio.create_task(preparation.run("a", lambda: gate.wait(60))) for _ in range(99)
        ]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(preparation.run("b", lambda: 7), 5) == 7
        gate.set()
        assert all(await asyncio.gather(*flood))
        assert not preparation._places and not preparation._work

    asyncio.run(run())


def test_what_is_cancelled_keeps_its_place_until_it_is_done_and_what_waits_never_begins() -> None:
    async def run() -> None:
        preparation, gate, begun = Preparation(), threading.Event(), count()

        def work() -> None:
            next(begun)
            gate.wait(60)

        tasks = [asyncio.create_task(preparation.run("a", work)) for _ in range(TENANT_WORKERS + 3)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        late = asyncio.create_task(preparation.run("a", work))
        await asyncio.sleep(0.05)
        gate.set()
        await late
        assert next(begun) == TENANT_WORKERS + 1  # the cancelled ones that ran, and the late one
        assert not preparation._places and not preparation._work

    asyncio.run(run())


def test_what_goes_wrong_is_told() -> None:
    async def run() -> None:
        with pytest.raises(ZeroDivisionError):
            await Preparation().run("a", lambda: 1 // 0)

    asyncio.run(run())


def test_python_without_end_is_ended() -> None:
    def endless() -> None:
        while True:
            pass

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"expected an end within 0\.2 s"):
        within(0.2, endless)
    assert time.monotonic() - began >= 0.2
    assert within(5.0, lambda: sum(range(10))) == 45
