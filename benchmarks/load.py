"""What the service carries, and what the queue costs. Each command starts its own Redis and processes.

    python -m benchmarks.load people --simulated      1,000 people talk for 5 minutes: throughput, latency, memory
    python -m benchmarks.load flood --simulated       one person floods: what the others notice of it
    python -m benchmarks.load scale                   1, 2, 4, 8 workers with an imagined device: replies a second
    python -m benchmarks.load overhead                one question at a time, an engine that takes no time
    python -m benchmarks.load redis                   questions a second that one Redis carries, and what each costs it
    python -m benchmarks.load memory                  what Redis holds of an open question and for the limits
    python -m benchmarks.load forever                 100,000 replies of the fish that ships: does its worker grow?

`--simulated` replaces the model with its time (tests/standins/engine.py), so that everything around it is measured.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from bot import queue
from bot.fish import FishError
from bot.limits import Limiter, RedisLimiter, Verdict
from bot.link import Link
from bot.queue import QueuedFish
from bot.settings import Settings
from tests.standins.processes import Process, awake, megabytes, until
from tests.standins.redis_server import RedisServer


@contextmanager
def service(
    workers: int, simulated: tuple[float, int] | None, **environment: str
) -> Iterator[tuple[RedisServer, list[Process]]]:
    """Redis and workers; `simulated` is an engine's milliseconds a step and steps a reply, None the real one."""
    folder = Path(tempfile.mkdtemp(prefix="guppy-load-"))
    redis = RedisServer(folder).start()
    command = ["-m", "bot", "worker"]
    if simulated is not None:
        command = ["-m", "tests.standins.engine", "--step-ms", str(simulated[0]), "--tokens", str(simulated[1])]
    environment = {"GUPPY_REDIS_URL": redis.url, "GUPPY_LOG_LEVEL": "WARNING", **environment}
    processes = [Process(command, folder / f"worker{n}", environment) for n in range(workers)]
    try:
        yield redis, processes
    finally:
        for process in processes:
            process.process.terminate()
        for process in processes:
            process.process.wait()
        redis.kill()


def settings_for(redis: RedisServer, **more: Any) -> Settings:
    return Settings.model_validate({"redis_url": redis.url, **more})


class Latencies:
    """How long things took, counted by tenths of a millisecond: millions take no more memory than hundreds."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._counts[round(seconds * 10_000)] += 1

    def update(self, others: "Latencies") -> None:
        self._counts.update(others._counts)

    def __len__(self) -> int:
        return self._counts.total()

    def percentile(self, p: int) -> float:
        """In seconds, so that `p` of 100 took no longer."""
        behind = len(self) * p // 100
        for tenths in sorted(self._counts):
            behind -= self._counts[tenths]
            if behind < 0:
                return tenths / 10_000
        return 0.0

    def __str__(self) -> str:
        return ", ".join(f"p{p} {1000 * self.percentile(p):.1f} ms" for p in (50, 95, 99))


def processor_seconds(redis: RedisServer) -> float:
    """What Redis has used of a core so far."""
    with redis.client() as client:
        cpu = client.info("cpu")
    return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


_messages = map(str, itertools.count())


class People:
    """People who each ask, read the reply for `think` seconds, and ask again, as an adapter sees them."""

    def __init__(self, fish: QueuedFish, limits: Limiter, think: float) -> None:
        self.fish, self.limits, self.think = fish, limits, think
        self.recent = Latencies()
        self.outcomes: Counter[str] = Counter()

    async def ask(self, person: str, words: str) -> None:
        started = time.perf_counter()
        async with self.limits.turn(person, next(_messages)) as turn:
            if turn.verdict is not Verdict.WELCOME:
                self.outcomes[turn.verdict.value] += 1
                return
            try:
                await self.fish.ask(words)
            except FishError as error:
                self.outcomes[error.line] += 1
                return
        self.outcomes["answered"] += 1
        self.recent.add(time.perf_counter() - started)

    async def live(self, person: str, until: float) -> None:
        await asyncio.sleep(random.uniform(0, self.think))
        while time.monotonic() < until:
            await self.ask(person, f"hi guppy, {person} here, what are you doing today")
            await asyncio.sleep(random.uniform(0.8, 1.2) * self.think)


async def people(arguments: argparse.Namespace) -> None:
    simulated = (arguments.step_ms, arguments.tokens) if arguments.simulated else None
    with service(arguments.workers, simulated) as (redis, workers):
        await awake(redis, arguments.workers)
        settings = settings_for(redis)
        limits = RedisLimiter(settings, "discord", settings.discord_token)
        async with QueuedFish(settings) as fish:
            crowd = People(fish, limits, arguments.think)
            begun, spent, of_redis = time.monotonic(), time.process_time(), processor_seconds(redis)
            until = begun + 60 * arguments.minutes
            living = asyncio.gather(*(crowd.live(f"person {n}", until) for n in range(arguments.people)))
            print(
                "minute  replies/s   reply                                      memory in MB: adapter, workers, Redis"
            )
            minute, everything = 0, Latencies()
            while not living.done():
                crowd.recent = recent = Latencies()
                started = time.monotonic()
                await asyncio.wait([living], timeout=min(60, 15 * arguments.minutes))
                if not recent:
                    break
                everything.update(recent)
                minute += 1
                with redis.client() as client:
                    used = client.info("memory")["used_memory"] / 1e6
                memory = f"{megabytes(os.getpid()):.0f}, {'+'.join(f'{megabytes(w.process.pid):.0f}' for w in workers)}"
                rate = len(recent) / (time.monotonic() - started)
                print(f"{minute:6}  {rate:9.1f}   {recent!s:42} {memory}, {used:.1f}", flush=True)
            await living
            took, spent = time.monotonic() - begun, time.process_time() - spent
            of_redis = processor_seconds(redis) - of_redis
        await limits.aclose()
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in crowd.outcomes.most_common())
    print(f"{arguments.people} people, {took:.0f} s: {outcomes}; {len(everything) / took:.1f} replies/s")
    print(f"all replies: {everything}")
    each = 1000 / crowd.outcomes.total()
    print(f"processor time a question: the adapter's {each * spent:.2f} ms, Redis' {each * of_redis:.3f} ms")


async def flood(arguments: argparse.Namespace) -> None:
    simulated = (arguments.step_ms, arguments.tokens) if arguments.simulated else None
    with service(arguments.workers, simulated) as (redis, _):
        await awake(redis, arguments.workers)
        settings = settings_for(redis)
        limits = RedisLimiter(settings, "discord", settings.discord_token)
        async with QueuedFish(settings) as fish:
            peace, storm = People(fish, limits, arguments.think), People(fish, limits, arguments.think)
            flooder = People(fish, limits, 0)
            for n in range(
                7
            ):  # in turns, so that a machine that is busy for a while is so for both; the first warms up
                crowd = storm if n % 2 else peace
                if n == 1:
                    peace.recent = Latencies()
                until = time.monotonic() + arguments.seconds / 3
                tasks = [asyncio.create_task(crowd.live(f"person {m}", until)) for m in range(arguments.people)]
                while crowd is storm and time.monotonic() < until:
                    tasks.append(asyncio.create_task(flooder.ask("flooder", "me me me")))
                    await asyncio.sleep(1 / arguments.per_second)
                await asyncio.gather(*tasks)
            for name, crowd in (("in peace", peace), ("in the flood", storm)):
                print(f"{name:13} {len(crowd.recent)} replies to the others, {crowd.recent}")
            p99 = [crowd.recent.percentile(99) for crowd in (peace, storm)]
            print(f"the flooder: {', '.join(f'{n} {outcome}' for outcome, n in flooder.outcomes.most_common())}")
            print(f"the others' p99 in the flood is {p99[1] / p99[0]:.2f} of that in peace")
        await limits.aclose()


async def scale(arguments: argparse.Namespace) -> None:
    print(f"an imagined device: {arguments.step_ms} ms a step, {arguments.tokens} steps a reply, 8 replies at once")
    single = 0.0
    for workers in (1, 2, 4, 8):
        with service(workers, (arguments.step_ms, arguments.tokens), GUPPY_MAX_BATCH="8") as (redis, _):
            await awake(redis, workers)
            async with QueuedFish(settings_for(redis, queue_cap=10_000)) as fish:
                until = time.monotonic() + arguments.seconds
                answered = 0

                async def one(fish: QueuedFish = fish, until: float = until) -> None:
                    nonlocal answered
                    while time.monotonic() < until:
                        await fish.ask("hi")
                        answered += 1

                started = time.monotonic()
                await asyncio.gather(*(one() for _ in range(workers * 24)))
                rate = answered / (time.monotonic() - started)
        single = single or rate
        print(
            f"{workers} workers: {rate:6.1f} replies/s, {rate / single / workers:.0%} of as many times one", flush=True
        )


async def overhead(arguments: argparse.Namespace) -> None:
    with service(1, (0, 1)) as (redis, _):
        await awake(redis)
        async with QueuedFish(settings_for(redis)) as fish:
            for at_once in (1, 8, 32):
                warming, measured = Latencies(), Latencies()

                async def one(seconds: Latencies) -> None:
                    started = time.perf_counter()
                    await fish.ask("hi guppy, what are you doing today")
                    seconds.add(time.perf_counter() - started)

                rounds = arguments.questions // at_once
                for n in range(rounds):
                    await asyncio.gather(*(one(measured if n > rounds // 10 else warming) for _ in range(at_once)))
                print(f"{at_once:3} at once: {measured}", flush=True)


async def redis_alone(arguments: argparse.Namespace) -> None:
    """Every step of a question through its real scripts, without adapters and workers around them."""
    with service(0, None) as (server, _):
        await asyncio.to_thread(_drive, server.url, 0.5)
        cpu, started = processor_seconds(server), time.monotonic()
        with ProcessPoolExecutor(arguments.clients, multiprocessing.get_context("spawn")) as clients:
            loop = asyncio.get_running_loop()
            runs = [
                loop.run_in_executor(clients, _drive, server.url, arguments.seconds) for _ in range(arguments.clients)
            ]
            rates = await asyncio.gather(*runs)
        seconds, cpu = time.monotonic() - started, processor_seconds(server) - cpu
    done = sum(rates) * arguments.seconds
    print(f"{sum(rates):.0f} questions/s through {arguments.clients} clients, for {arguments.seconds:.0f} s")
    print(
        f"Redis: {cpu / seconds:.0%} of a core, {1e6 * cpu / done:.0f} us a question; {done / cpu:.0f}/s would fill it"
    )


def _drive(url: str, seconds: float) -> float:
    """Put questions on the queue, answer whatever is there, collect the replies: collected ones a second."""
    return asyncio.run(_driving(Settings.model_validate({"redis_url": url}), seconds))


async def _driving(settings: Settings, seconds: float) -> float:
    link, intake, replies = (
        Link(settings),
        queue.Intake(settings),
        f"{queue.TAG}:replies:{random.getrandbits(128):032x}",
    )
    await intake.tend([], 0)
    batch, done, started = 128, 0, time.monotonic()
    while time.monotonic() - started < seconds:
        asking = [
            link.run(
                queue.ENQUEUE,
                [queue.REQUESTS, f"{queue.TAG}:text:{id}", queue.WORKERS],
                *(queue.GROUP, queue.VERSION, id, replies, "hi guppy, what are you doing today", 20_000),
                *(1000, queue.KEEP, queue.AWAKE),
            )
            for id in (f"{random.getrandbits(128):032x}" for _ in range(batch))
        ]
        await asyncio.gather(*asking)
        answering = [
            link.run(
                queue.ANSWER,
                [queue.REQUESTS, f"{queue.TAG}:text:{request.id}", request.replies],
                *(queue.GROUP, request.entry, queue.VERSION, request.id, "answered", "i am swimming. " * 4),
            )
            for request in await intake.take(batch)
        ]
        await asyncio.gather(*answering)
        while found := await link.call("XREAD", "COUNT", queue.COLLECT, "STREAMS", replies, "0"):
            [[_, notices]] = found
            keys = [f"{queue.TAG}:text:{fields[3].decode()}" for _, fields in notices]
            texts = await link.run(queue.COLLECT_REPLIES, [replies, *keys], *(entry for entry, _ in notices))
            done += sum(text is not None for text in texts)
    rate = done / (time.monotonic() - started)
    await link.aclose()
    await intake.aclose()
    return rate


async def memory(arguments: argparse.Namespace) -> None:
    """Each question by another person; what the limits keep of it without the queue, then the queue without limits."""
    with service(0, None) as (redis, _), redis.client() as client:
        settings = settings_for(redis, queue_cap=arguments.questions)
        limits = RedisLimiter(settings, "discord", settings.discord_token)

        def show(what: str, empty: int) -> None:
            used = (client.info("memory")["used_memory"] - empty) / arguments.questions
            print(f"{what:44} {used:4.0f} bytes", flush=True)

        async def turn(n: int) -> None:
            async with limits.turn(f"person {n}", next(_messages)):
                await answered.wait()

        answered = asyncio.Event()
        empty = client.info("memory")["used_memory"]
        turns = [asyncio.create_task(turn(n)) for n in range(arguments.questions)]
        await until(lambda: client.dbsize() == 3 * arguments.questions)
        show("the limits, of a message that is open", empty)
        answered.set()
        await asyncio.gather(*turns)
        show("the limits, of one that is answered", empty)
        await asyncio.sleep(60 / settings.person_per_minute + 3)
        show("the limits, when its person may ask again", empty)
        await limits.aclose()
        client.flushall()
        async with QueuedFish(settings) as fish:
            empty = client.info("memory")["used_memory"]
            asking = [
                asyncio.create_task(fish.ask("hi guppy, what are you doing today")) for _ in range(arguments.questions)
            ]
            await until(lambda: client.xlen(queue.REQUESTS) == arguments.questions)
            show("the queue, of a question that is open", empty)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


async def forever(arguments: argparse.Namespace) -> None:
    asked = itertools.cycle(["hi", "are you hungry", "what did you do today", "my aunt bought me a red kite " * 10])
    with service(1, None) as (redis, [worker]):
        await awake(redis)
        async with QueuedFish(settings_for(redis)) as fish:
            answered, started = 0, time.monotonic()

            async def one(until: int) -> None:
                nonlocal answered
                while answered < until:
                    await fish.ask(next(asked))
                    answered += 1

            for share in (1, 10, 25, 50, 75, 100):
                await asyncio.gather(*(one(arguments.replies * share // 100) for _ in range(64)))
                print(
                    f"{answered:7,} replies in {time.monotonic() - started:4.0f} s: the worker has "
                    f"{megabytes(worker.process.pid):.1f} MB, the asking process {megabytes(os.getpid()):.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Any, step_ms: float = 4.0, tokens: int = 12) -> argparse.ArgumentParser:
        one = commands.add_parser(name)
        one.set_defaults(run=run)
        one.add_argument("--step-ms", type=float, default=step_ms, help="of the simulated engine")
        one.add_argument("--tokens", type=int, default=tokens, help="of a simulated reply")
        return one

    for name, run, crowd in (("people", people, 1000), ("flood", flood, 200)):
        one = command(name, run)
        one.add_argument("--simulated", action="store_true", help="an engine that only takes the time of one")
        one.add_argument("--people", type=int, default=crowd)
        one.add_argument("--workers", type=int, default=2)
        one.add_argument("--think", type=float, default=6.0, help="seconds between a reply and the next question")
        one.add_argument("--minutes", type=float, default=5.0)
        one.add_argument("--seconds", type=float, default=30.0)
        one.add_argument("--per-second", type=float, default=100.0, help="messages of the flooder")
    command("scale", scale, step_ms=20.0, tokens=10).add_argument("--seconds", type=float, default=10.0)
    command("overhead", overhead).add_argument("--questions", type=int, default=2000)
    alone = command("redis", redis_alone)
    alone.add_argument("--seconds", type=float, default=10.0)
    alone.add_argument("--clients", type=int, default=2, help="processes that keep Redis busy")
    command("memory", memory).add_argument("--questions", type=int, default=5000)
    command("forever", forever).add_argument("--replies", type=int, default=100_000)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))  # measured is the service, not print
    asyncio.run(arguments.run(arguments))


if __name__ == "__main__":
    main()
