"""Several streams as one, ahead of whoever reads it."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Yield what all streams yield, as it comes; ends with the last, or with the first error.

    The streams do not wait for the reader: one that reads slowly keeps none of them from its end.
    However it ends, all streams are closed by then.
    """
    items: asyncio.Queue[T | Exception | None] = asyncio.Queue()

    async def follow(stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    items.put_nowait(item)
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(follow(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            came = await items.get()
            if isinstance(came, Exception):
                raise came
            if came is None:
                left -= 1
            else:
                yield came
    finally:
        for task in tasks:
            task.cancel()
        await _all_ended(tasks)


async def _all_ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for the end of all tasks, however often this one is cancelled."""
    cancelled = False
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
