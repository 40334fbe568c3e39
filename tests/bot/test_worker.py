"""A worker feeds its engine as questions come, takes what it can run, and says how it is doing: `bot/worker.py`."""

import asyncio
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bot.fish import Fish, Reply
from bot.local import LocalFish, load
from bot.queue import REQUESTS, QueuedFish
from bot.settings import Settings
from tests.bot.conftest import StartWorker
from tests.standins.engine import StandInEngine
from tests.standins.processes import Process, awake, in_hand, megabytes, scrape, until, working
from tests.standins.redis_server import RedisServer, free_port


async def test_a_question_does_not_wait_for_those_before_it_to_end(settings: Settings) -> None:
    async with working(settings, StandInEngine(0.05, 20)), QueuedFish(settings) as fish:
        ended: list[str] = []

        async def ask(name: str) -> None:
            await fish.ask(name)
            ended.append(f"{name} {time.monotonic() - started:.1f}")

        started = time.monotonic()
        first = asyncio.create_task(ask("first"))
        await asyncio.sleep(0.5)
        await asyncio.gather(first, ask("second"))
    seconds = [float(entry.split()[1]) for entry in ended]
    assert [entry.split()[0] for entry in ended] == ["first", "second"]
    assert seconds[1] - seconds[0] < 0.8, "a fixed batch would have made it a whole second"


async def test_a_worker_takes_no_more_than_it_runs_at_once(settings: Settings, redis_server: RedisServer) -> None:
    small = settings.model_copy(update={"max_batch": 3})
    engine = StandInEngine(0.02, 10)
    client = redis_server.client()
    async with working(small, engine), QueuedFish(settings) as fish:
        asking = asyncio.gather(*(fish.ask(f"{n}") for n in range(20)))
        most = 0
        while not asking.done():
            pending = client.xpending(REQUESTS, "workers")["pending"] if client.exists(REQUESTS) else 0
            most = max(most, pending)
            await asyncio.sleep(0.005)
        assert [reply.text for reply in await asking] == [f"blub. {n}" for n in range(20)]
    assert 0 < most <= 3


async def test_a_worker_that_is_slow_but_steps_keeps_its_questions(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    """A reply that takes longer than the time after which others would take it over."""
    slow = start_worker(step_ms=100, tokens=30, hasty=2)
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        asking = asyncio.create_task(fish.ask("take your time"))
        await in_hand(redis_server, 1)
        other = start_worker(hasty=2)
        assert (await asking).text == "blub. take your time"
    assert '"tries": 2' not in slow.log.read_text() + other.log.read_text()


async def test_a_worker_counts_what_an_operator_asks_for(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    port = free_port()
    start_worker(GUPPY_METRICS_PORT=str(port))
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        await asyncio.gather(*(fish.ask(f"{n}") for n in range(10)))
    redis_server.client().xadd(REQUESTS, {"no": "question"})

    def values() -> dict[Any, float]:
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(scrape(port))
            for sample in family.samples
        }

    await until(lambda: values().get(("guppy_work_total", "unreadable")) == 1)
    await asyncio.sleep(1.2)
    now = await asyncio.to_thread(values)
    assert now["guppy_work_total", "answered"] == 10
    assert now["guppy_tokens_total",] == 80
    assert now["guppy_queue_wait_seconds_count",] == now["guppy_infer_seconds_count",] == 10
    assert now["guppy_first_word_seconds_count",] == 10
    assert 0 < now["guppy_first_word_seconds_sum",] < now["guppy_infer_seconds_sum",]
    assert now["guppy_queue_depth",] == now["guppy_queue_age_seconds",] == now["guppy_in_hand",] == 0
    assert now["guppy_workers",] == 1
    assert not any("person" in str(name) or "chat" in str(name) for name in now)


@pytest.fixture
def worker(redis_server: RedisServer, tmp_path: Path) -> Iterator[Process]:
    """The worker that ships, with the fish that ships."""
    process = Process(["-m", "bot", "worker"], tmp_path / "worker", {"GUPPY_REDIS_URL": redis_server.url})
    yield process
    process.process.kill()
    process.process.wait()


@pytest.mark.usefixtures("worker")
async def test_the_same_question_has_the_same_reply_here_and_through_the_queue(
    settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id, which only the asking end knows, decides it: the fish in this process and that in the worker agree."""
    prompts = ["are you hungry", "hi", "", "🐟", "what is a \ud83d", "tell me a story about my aunt " * 40] * 4
    ids = [secrets.token_hex(16) for _ in prompts]

    async def replies(fish: Fish) -> list[Reply]:
        given = iter(ids)
        with monkeypatch.context() as patched:
            patched.setattr(secrets, "token_hex", lambda _: next(given))
            return await asyncio.gather(*(fish.ask(prompt) for prompt in prompts))

    await awake(redis_server)
    async with QueuedFish(settings) as queued:
        through_the_queue = await replies(queued)
    engine = await load(settings)
    try:
        here = await replies(LocalFish(engine, settings))
    finally:
        await engine.aclose()
    assert here == through_the_queue
    assert len({reply.text for reply in here}) > len(set(prompts)), "the same prompt with another id has another reply"


async def test_a_worker_needs_600_megabytes_and_no_more_after_thousands_of_replies(
    settings: Settings, redis_server: RedisServer, worker: Process
) -> None:
    await awake(redis_server)
    async with QueuedFish(settings) as fish:

        async def ask(prompt: str, times: int) -> None:
            for _ in range(times):
                await fish.ask(prompt)

        await asyncio.gather(*(ask("tell me a story about my aunt " * 10, 10) for _ in range(32)))
        after_hundreds = megabytes(worker.process.pid)
        await asyncio.gather(*(ask("hi", 60) for _ in range(32)))
        after_thousands = megabytes(worker.process.pid)
    assert after_thousands < 600
    assert after_thousands - after_hundreds < 10, "100,000 more would not fit either"
