"""Is this process doing its work? `python -m bot health ROLE` says so, for container health checks.

A process that lives is not a process that works, so nothing here is a timer: each role names what progress means for it
(a gateway that acknowledges, a poll that returned, an engine that steps while there are questions) and only while that
holds does its pulse go on. The pulse is the modification time of a file in the temporary directory; a file, because the
check must not depend on Redis, and an adapter that waits for Redis is alive.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

BEAT = 1.0
"""Seconds between two looks at the progress."""
STALE = 15.0
"""Seconds without a beat after which a process counts as stuck."""
STALLED = 10.0
"""Seconds without a step after which an engine with work counts as stuck."""


def _file(role: str) -> Path:
    return Path(tempfile.gettempdir()) / f"guppy-{role}.pulse"


@asynccontextmanager
async def pulse(role: str, progressing: Callable[[], bool]) -> AsyncIterator[None]:
    """While the block runs, beat for `role` each second in which `progressing()` is true, from this event loop.

    Before the first beat, and once the block is left, the role is not healthy.
    """
    file = _file(role)

    async def beat() -> None:
        while True:
            if progressing():
                file.touch()
            await asyncio.sleep(BEAT)

    file.unlink(missing_ok=True)  # a container that restarts keeps its files: the last life's pulse is not ours
    task = asyncio.create_task(beat(), name=f"pulse of {role}")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        file.unlink(missing_ok=True)


class Progress:
    """Whether an engine steps while it has something to do.

    `steps` counts what it has done so far, `busy` says whether it should be doing more.
    """

    def __init__(self, steps: Callable[[], int], busy: Callable[[], bool]) -> None:
        self._steps, self._busy = steps, busy
        self._last_steps = steps()
        self._since = time.monotonic()

    def stalled(self) -> float:
        """Seconds without progress, as far as this was asked; 0 when there is nothing to do."""
        steps = self._steps()
        if steps != self._last_steps or not self._busy():
            self._last_steps = steps
            self._since = time.monotonic()
        return time.monotonic() - self._since


def check(role: str) -> str | None:
    """What is wrong with `role` in this container, in one sentence; None when it is well."""
    try:
        age = time.time() - _file(role).stat().st_mtime
    except FileNotFoundError:
        return f"{role} is not ready (or not running)."
    if age > STALE:
        return f"{role} has made no progress for {age:.0f} seconds."
    return None
