"""A worker: an engine that answers what comes over the queue. Start as many as you like; they share the work.

Questions go into the engine as they arrive and leave it as they are done. A worker takes no more than the engine runs
at once, so that what it holds when it dies is little, and others find it on the queue. Each second in which the engine
makes progress the worker says so there; when it stops saying so its questions are taken over, and when it has had
questions without progress for too long it ends itself: a hung thread doesn't come back.
"""

import asyncio
import contextlib
import time

from bot import health, logs
from bot.fish import Reply
from bot.lifetime import unless_stopped
from bot.link import Away
from bot.local import Engine, load, think
from bot.queue import TRIES, Intake, Request
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings

TEND = 1.0
"""Seconds between two signs of progress."""
SILENT = 2.5
"""Seconds without a step after which a worker gives no more signs, so that others take its questions over."""
DRAIN = 8.0
"""Seconds for what is in work when the worker is asked to stop."""

log = logs.get("worker")


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Load the model, wait for Redis, then work until `stop` is set. Raises `Refusal`."""
    engine = await unless_stopped(stop, load(settings))
    try:
        await run(settings, engine, stop)
    finally:
        await engine.aclose()


async def run(settings: Settings, engine: Engine, stop: asyncio.Event) -> None:
    """Answer questions with `engine` until `stop` is set, then finish those in hand. Raises `Refusal`, or
    `Stopped` if it had not begun.

    Waits for a Redis that is away, at the start and at any time.
    """
    intake = Intake(settings)
    await unless_stopped(stop, intake.ready())
    try:
        await _Worker(settings, engine, intake).run(stop)
    finally:
        await intake.aclose()


class _Worker:
    def __init__(self, settings: Settings, engine: Engine, intake: Intake) -> None:
        self._engine = engine
        self._intake = intake
        self._most = settings.max_batch
        self._in_hand: dict[bytes, Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._thinking = 0
        self._progress = health.Progress(lambda: engine.steps, lambda: self._thinking > 0)
        self._stopping = False

    async def run(self, stop: asyncio.Event) -> None:
        async with health.pulse("worker", lambda: self._progress.stalled() < health.STALLED):
            await self._tend()
            log.info("awake", max_batch=self._most)
            tending = asyncio.create_task(self._keep_tending(), name="signs of progress")
            taking = asyncio.create_task(self._keep_taking(stop), name="questions from the queue")
            try:
                await asyncio.wait([tending, taking], return_when=asyncio.FIRST_COMPLETED)
                if tending.done():
                    tending.result()
                await taking
                log.info("stopping", in_hand=len(self._in_hand))
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=DRAIN)
            finally:
                for task in (tending, taking, *self._tasks):
                    task.cancel()
                await asyncio.gather(tending, taking, *self._tasks, return_exceptions=True)

    async def _keep_taking(self, stop: asyncio.Event) -> None:
        pause = 0.05
        while not stop.is_set():
            if not self._free():
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                continue
            try:
                self._start(await self._intake.take(self._free()))
                pause = 0.05
            except Away:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)
                await self._tend()  # a Redis that came back empty has no group to read from
        self._stopping = True

    async def _keep_tending(self) -> None:
        while True:
            await asyncio.sleep(TEND)
            stalled = self._progress.stalled()
            if stalled > health.STALLED:
                raise Refusal(
                    f"The engine has had questions for {stalled:.0f} seconds and made no step; this worker ends so "
                    "that a fresh one can take its place.",
                    ExitCode.STUCK,
                )
            if stalled < SILENT:
                await self._tend()

    async def _tend(self) -> None:
        claim = 0 if self._stopping else self._free()
        # The link says that Redis is away; what is in hand is answered or taken over when it is back.
        with contextlib.suppress(Away):
            self._start(await self._intake.tend(list(self._in_hand.values()), claim))

    def _free(self) -> int:
        return max(0, self._most - len(self._in_hand))

    def _start(self, requests: list[Request]) -> None:
        # Not in the loop that takes them: its variable would keep the last one's words until the next one comes.
        for request in requests:
            if request.entry in self._in_hand:
                continue  # taken over from ourselves, after a pause in which we gave no sign
            self._in_hand[request.entry] = request
            task = asyncio.create_task(self._work(request), name="question")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, request: Request) -> None:
        started = time.perf_counter()
        try:
            self._thinking += 1
            try:
                completion = await think(self._engine, request.prompt, request.id)
            finally:
                self._thinking -= 1
            seconds = time.perf_counter() - started
            outcome = await self._intake.answer(request, Reply(completion.text, completion.prompt_cut))
            log.info(
                "answered",
                id=request.id,
                outcome=outcome,
                waited=round(request.waited, 3),
                first_word=round(completion.first_word, 3),
                seconds=round(seconds, 3),
                tokens=completion.tokens,
                tries=request.tries,
            )
        except Away as away:
            log.warning("could not hand over a reply; it is made again", id=request.id, reason=str(away))
        except Exception as error:  # one question must never end the worker; a bug shows in the log and the counts
            log.error("failed", id=request.id, tries=request.tries, exc_info=error)
            await self._failed(request)
        finally:
            del self._in_hand[request.entry]

    async def _failed(self, request: Request) -> None:
        """Leave it to be taken over once more; after that, give it up."""
        if request.tries < TRIES:
            return
        try:
            await self._intake.give_up(request)
        except Away as away:
            log.warning("could not give up a question; it expires", id=request.id, reason=str(away))
