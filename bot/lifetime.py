"""From start to stop: how a process leaves off waiting when it is asked to stop, and how long it may finish.

SIGTERM sets one event, `stop`. Whatever only waits (for Redis, for the network, for a model) ends at once; whatever
answers someone may finish.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 9.0
"""Seconds from the signal until what still runs is cut off. Docker kills after 10."""


class Stopped(Exception):
    """`stop` was set while there was nothing to finish."""


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when `stop` is set first. Raises `Stopped` then."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Stopped
    finally:
        for waiting in (task, stopped):
            waiting.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


async def until_finished(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which ends by itself after `stop` is set; GRACE seconds after that it is cut off."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([task], timeout=GRACE)
        if task.done():
            task.result()
    finally:
        for waiting in (task, stopped):
            waiting.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
