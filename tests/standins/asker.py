"""An adapter without a platform: a process that asks through the queue and says on standard output what came of it.

    python -m tests.standins.asker --name a --questions 100 --at-once 20

One JSON line a question, written when it ended: {"question", "outcome", "right", "seconds"}; `outcome` is "answered"
or the line that a person would have been told, `right` is whether the reply belongs to the question. Questions come
as fast as replies, or `--per-second` at most.
"""

import argparse
import asyncio
import json
import sys
import time

from bot import logs
from bot.fish import FishError
from bot.queue import QueuedFish
from bot.settings import Settings, load


async def _ask(fish: QueuedFish, question: str) -> None:
    started = time.monotonic()
    right = True
    try:
        reply = await fish.ask(question)
        outcome, right = "answered", reply.text == f"blub. {question}"
    except FishError as error:
        outcome = error.line
    seconds = round(time.monotonic() - started, 4)
    line = {"question": question, "outcome": outcome, "right": right, "seconds": seconds}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def _main(settings: Settings, name: str, questions: int, at_once: int, per_second: float) -> None:
    places = asyncio.Semaphore(at_once)

    async def one(n: int) -> None:
        async with places:
            await _ask(fish, f"{name} {n}")

    loop = asyncio.get_running_loop()
    logs.loop_errors(loop)
    async with QueuedFish(settings) as fish, asyncio.TaskGroup() as asking:
        begun = loop.time()
        for n in range(questions):
            if per_second:
                await asyncio.sleep(max(0.0, begun + n / per_second - loop.time()))
            asking.create_task(one(n))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--name", default="asker")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--per-second", type=float, default=0)
    arguments = parser.parse_args()
    settings = load()
    logs.configure(settings, "asker")
    asyncio.run(_main(settings, arguments.name, arguments.questions, arguments.at_once, arguments.per_second))
