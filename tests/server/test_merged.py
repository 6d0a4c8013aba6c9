"""Several streams as one: whoever cancels it, all are closed by its end."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from spieldose_server.merged import merged


def test_however_often_it_is_cancelled_it_ends_after_its_streams() -> None:
    async def run() -> None:
        closing, closed = asyncio.Event(), asyncio.Event()

        async def stream() -> AsyncGenerator[int]:
            try:
                yield 1
                await asyncio.sleep(60)
            finally:
                closing.set()
                await asyncio.sleep(0.2)
                closed.set()

        async def read() -> None:
            async for _ in merged([stream()]):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        for _ in range(3):
            task.cancel()
            await closing.wait()
            await asyncio.sleep(0.02)
            assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed.is_set()

    asyncio.run(run())
