"""An engine without a model: it takes the time of one, and answers each prompt with itself.

It batches as the real one does: each step takes `step_seconds` of the (imagined) device whatever the batch, a reply
takes `tokens` steps, and up to `max_batch` replies are written at once. So what is measured with it is everything
around the model. Run as a program it is a whole worker, with the settings of its environment:

    python -m tests.standins.engine --step-ms 4 --tokens 12

A prompt can make it misbehave: one that holds "(raise)" fails, "(die)" kills the process, "(hang)" stops the steps
for good, as a thread that got stuck would. `--hasty 3` makes the worker three times quicker to see that something
stands still.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

from bot import health, logs, metrics, queue, worker
from bot.lifetime import Stopped, until_finished
from bot.refusal import Refusal
from bot.settings import Settings, load


@dataclass(frozen=True)
class Completion:
    text: str
    prompt_cut: bool
    tokens: int
    first_word: float


@dataclass(eq=False)
class _Reply:
    prompt: str = field(repr=False)
    steps_left: int
    done: asyncio.Future[Completion]
    asked: float
    first_word: float | None = None


class StandInEngine:
    def __init__(self, step_seconds: float = 0.001, tokens: int = 8, max_batch: int = 32, window: int = 2000) -> None:
        self.steps = 0
        self._step_seconds, self._tokens, self._max_batch, self._window = step_seconds, tokens, max_batch, window
        self._waiting: deque[_Reply] = deque()
        self._running: list[_Reply] = []
        self._loop: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    async def ask(self, prompt: str, *, seed: int) -> Completion:
        if "(die)" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if "(raise)" in prompt:
            raise ValueError(f"this engine cannot read {prompt!r}")
        loop = asyncio.get_running_loop()
        reply = _Reply(prompt, self._tokens, loop.create_future(), loop.time())
        self._waiting.append(reply)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._work())
        return await reply.done

    async def aclose(self) -> None:
        if self._loop is not None:
            self._loop.cancel()

    async def _work(self) -> None:
        clock = asyncio.get_running_loop().time
        next_step = clock()
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._max_batch:
                self._running.append(self._waiting.popleft())
            # From step to step on a clock of its own, so that a loop that wakes late doesn't slow the device down.
            next_step = max(next_step + self._step_seconds, clock() - self._step_seconds)
            await asyncio.sleep(max(0.0, next_step - clock()))
            if any("(hang)" in reply.prompt for reply in self._running):
                await asyncio.Event().wait()
            self.steps += 1
            for reply in self._running:
                if reply.first_word is None:
                    reply.first_word = clock() - reply.asked
                reply.steps_left -= 1
                if reply.steps_left <= 0 and not reply.done.done():
                    text = f"blub. {reply.prompt[: self._window]}"
                    cut = len(reply.prompt) > self._window
                    reply.done.set_result(Completion(text, cut, self._tokens, reply.first_word))
            self._running = [reply for reply in self._running if not reply.done.done()]


def hasty(by: float) -> Iterator[tuple[ModuleType, str, float]]:
    """Module, name and value of the times by which a worker tells that something stands still, `by` times shorter."""
    for module, name in ((queue, "CLAIM_AFTER"), (worker, "TEND"), (worker, "SILENT"), (health, "STALLED")):
        value = getattr(module, name)
        yield module, name, type(value)(value / by)


async def _main(settings: Settings, engine: StandInEngine) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    logs.loop_errors(loop)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    metrics.serve(settings)
    await until_finished(stop, worker.run(settings, engine, stop))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--step-ms", type=float, default=1.0, help="device time of one step")
    parser.add_argument("--tokens", type=int, default=8, help="steps of one reply")
    parser.add_argument("--hasty", type=float, default=1.0)
    arguments = parser.parse_args()
    settings = load()
    logs.configure(settings, "worker")
    for module, name, value in hasty(arguments.hasty):
        setattr(module, name, value)
    try:
        asyncio.run(_main(settings, StandInEngine(arguments.step_ms / 1000, arguments.tokens, settings.max_batch)))
    except Stopped:
        pass
    except Refusal as refusal:
        sys.stderr.write(f"{refusal.sentence}\n")
        sys.exit(refusal.exit_code)
