"""What happens when something dies, hangs, fills up or comes too late, with real processes and a real Redis."""

import asyncio
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path

import pytest

from bot import health, link, queue
from bot.fish import Asleep, Busy, Confused, Reply
from bot.queue import REQUESTS, TRIES, QueuedFish
from bot.refusal import ExitCode
from bot.settings import Settings
from tests.bot.conftest import StartWorker
from tests.standins.engine import StandInEngine
from tests.standins.processes import Process, awake, in_hand, until, working
from tests.standins.redis_server import RedisServer


async def outcome(asking: Awaitable[Reply]) -> str:
    try:
        return (await asking).text
    except (Asleep, Busy, Confused) as error:
        return error.line


async def test_no_worker_the_queue_fills_and_then_refuses_at_once(
    settings: Settings, redis_server: RedisServer
) -> None:
    async with QueuedFish(settings.model_copy(update={"queue_cap": 5, "deadline": 2})) as fish:
        started = time.monotonic()
        waiting = [asyncio.create_task(outcome(fish.ask(f"{n}"))) for n in range(5)]
        await until(lambda: redis_server.client().xlen(REQUESTS) == 5)
        assert await outcome(fish.ask("one more")) == "asleep"
        assert time.monotonic() - started < 1.5
        assert await asyncio.gather(*waiting) == ["asleep"] * 5
        assert time.monotonic() - started < 3.5


async def test_a_worker_killed_in_the_middle_costs_a_retry_and_no_second_reply(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    first = start_worker(step_ms=50, tokens=20, hasty=3)
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        asking = [asyncio.create_task(outcome(fish.ask(f"{n}"))) for n in range(10)]
        await in_hand(redis_server, 10)
        first.process.kill()
        second = start_worker(hasty=3)
        assert await asyncio.gather(*asking) == [f"blub. {n}" for n in range(10)]
    await until(lambda: second.log.read_text().count('"tries": 2') == 10)  # written down after the reply is sent
    assert redis_server.client().xlen(REQUESTS) == 0


async def test_a_frozen_workers_questions_are_taken_over_and_what_it_says_later_is_not_heard(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    frozen = start_worker(step_ms=50, tokens=20, hasty=3)
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        asking = [asyncio.create_task(outcome(fish.ask(f"{n}"))) for n in range(5)]
        await in_hand(redis_server, 5)
        frozen.process.send_signal(signal.SIGSTOP)
        start_worker(hasty=3)
        assert await asyncio.gather(*asking) == [f"blub. {n}" for n in range(5)]
        frozen.process.send_signal(signal.SIGCONT)
        await until(lambda: frozen.log.read_text().count('"event": "answered"') == 5)
        assert frozen.log.read_text().count("overtaken") == 5
        assert not redis_server.client().keys("{guppy}:text:*")
        assert await outcome(fish.ask("again")) == "blub. again"


async def test_a_question_that_fails_is_tried_twice_and_then_given_up(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    worker = start_worker(hasty=3)
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        poisoned = asyncio.create_task(outcome(fish.ask("secret (raise)")))
        for n in range(20):
            assert await outcome(fish.ask(f"{n}")) == f"blub. {n}"
        assert await poisoned == "confused"
    await until(lambda: worker.log.read_text().count('"event": "failed"') == TRIES)
    assert "secret" not in worker.log.read_text()
    assert redis_server.client().xlen(REQUESTS) == 0


async def test_a_question_that_kills_its_workers_kills_no_more_than_two(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    workers = [start_worker(hasty=3)]
    await awake(redis_server)
    async with QueuedFish(settings.model_copy(update={"deadline": 60})) as fish:
        poisoned = asyncio.create_task(outcome(fish.ask("(die)")))
        for _ in range(2):
            assert await asyncio.to_thread(workers[-1].exit_code) == -signal.SIGKILL
            workers.append(start_worker(hasty=3))
        assert await poisoned == "confused"
        assert await outcome(fish.ask("and you")) == "blub. and you"
    assert workers[-1].process.poll() is None


async def test_a_worker_that_hangs_becomes_unhealthy_ends_itself_and_others_take_over(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = start_worker(hasty=3, GUPPY_MAX_BATCH="2")
    await awake(redis_server)
    async with QueuedFish(settings.model_copy(update={"deadline": 60})) as fish:
        lost = asyncio.create_task(outcome(fish.ask("(hang)")))
        await in_hand(redis_server, 1)
        innocent = asyncio.create_task(outcome(fish.ask("innocent")))
        await in_hand(redis_server, 2)
        lost.cancel()
        start_worker(hasty=3)
        assert await innocent == "blub. innocent"
        assert await asyncio.to_thread(hanging.exit_code) == ExitCode.STUCK
    assert "made no step" in hanging.log.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(hanging.folder))
    assert health.check("worker") is not None


async def test_adapter_and_worker_wait_for_a_redis_that_comes_later(
    redis_server: RedisServer, settings: Settings, start_worker: StartWorker
) -> None:
    redis_server.kill()
    worker = start_worker()

    async def adapter() -> str:
        async with QueuedFish(settings) as fish:
            return await outcome(fish.ask("finally"))

    waiting = asyncio.create_task(adapter())
    await worker.logs("redis is away")
    await asyncio.sleep(1)
    assert not waiting.done()
    assert worker.process.poll() is None
    redis_server.start()
    assert await waiting == "blub. finally"


async def test_while_redis_is_away_questions_fail_soon_and_afterwards_are_answered(
    redis_server: RedisServer, settings: Settings, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "PATIENCE", 1.0)
    worker = start_worker()
    await awake(redis_server)
    async with QueuedFish(settings.model_copy(update={"deadline": 60})) as fish:
        assert await outcome(fish.ask("before")) == "blub. before"
        redis_server.kill()
        started = time.monotonic()
        pending = [asyncio.create_task(outcome(fish.ask(f"{n}"))) for n in range(3)]
        blocked = 0.0
        while not all(task.done() for task in pending):
            tick = time.monotonic()
            await asyncio.sleep(0.01)
            blocked = max(blocked, time.monotonic() - tick)
        assert await asyncio.gather(*pending) == ["asleep"] * 3
        assert time.monotonic() - started < 20
        assert blocked < 2, "the event loop goes on, or a gateway's heartbeat would be missed"
        started = time.monotonic()
        assert await outcome(fish.ask("during")) == "asleep"
        assert time.monotonic() - started < 1
        redis_server.start()
        await awake(redis_server)
        await until(lambda: fish._away_since is None)
        assert await outcome(fish.ask("after")) == "blub. after"
    assert worker.process.poll() is None


@pytest.mark.slow
async def test_worker_and_adapter_live_through_a_minute_without_redis(
    redis_server: RedisServer, settings: Settings, start_worker: StartWorker
) -> None:
    worker = start_worker()
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        assert await outcome(fish.ask("before")) == "blub. before"
        await asyncio.to_thread(redis_server.restart_empty, 60)
        await awake(redis_server)
        await until(lambda: fish._away_since is None)
        assert await outcome(fish.ask("after")) == "blub. after"
    assert worker.process.poll() is None


async def test_a_redis_that_restarts_empty_gets_the_open_questions_again(
    redis_server: RedisServer, settings: Settings, start_worker: StartWorker
) -> None:
    start_worker(step_ms=50, tokens=20)
    await awake(redis_server)
    async with QueuedFish(settings.model_copy(update={"deadline": 40})) as fish:
        asking = [asyncio.create_task(outcome(fish.ask(f"{n}"))) for n in range(40)]
        await in_hand(redis_server, 32)
        await asyncio.to_thread(redis_server.restart_empty, 1.0)
        assert await asyncio.gather(*asking) == [f"blub. {n}" for n in range(40)]
    assert redis_server.client().xlen(REQUESTS) == 0


async def test_lost_groups_and_scripts_are_made_again(settings: Settings, redis_server: RedisServer) -> None:
    client = redis_server.client()
    async with working(settings), QueuedFish(settings) as fish:
        assert await outcome(fish.ask("before")) == "blub. before"
        client.script_flush()
        assert await outcome(fish.ask("no scripts")) == "blub. no scripts"
        client.xgroup_destroy(REQUESTS, queue.GROUP)
        assert await outcome(fish.ask("no group")) == "blub. no group"
        client.flushall()
        assert await outcome(fish.ask("nothing at all")) == "blub. nothing at all"


async def test_a_redis_that_does_not_answer_for_two_seconds_only_takes_longer(
    settings: Settings, redis_server: RedisServer
) -> None:
    async with working(settings), QueuedFish(settings) as fish:
        assert await outcome(fish.ask("before")) == "blub. before"
        with redis_server.client(socket_timeout=10) as client:
            sleeping = asyncio.create_task(asyncio.to_thread(client.execute_command, "DEBUG", "SLEEP", "2"))
            await asyncio.sleep(0.1)
            assert await outcome(fish.ask("meanwhile")) == "blub. meanwhile"
            await sleeping


async def test_a_redis_frozen_for_longer_is_an_outage_and_then_none(
    settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "PATIENCE", 1.0)
    monkeypatch.setattr(link, "TIMEOUT", 1.5)
    async with working(settings), QueuedFish(settings.model_copy(update={"deadline": 60})) as fish:
        assert await outcome(fish.ask("before")) == "blub. before"
        redis_server.freeze()
        started = time.monotonic()
        assert await outcome(fish.ask("frozen")) == "asleep"
        assert time.monotonic() - started < 30
        redis_server.thaw()
        await until(lambda: fish._away_since is None)
        assert await outcome(fish.ask("after")) == "blub. after"


async def test_a_full_redis_is_a_busy_fish_and_the_worker_goes_on(
    settings: Settings, redis_server: RedisServer, hasty_here: None
) -> None:
    client = redis_server.client()
    async with working(settings, StandInEngine(0.05, 20)), QueuedFish(settings) as fish:
        before = asyncio.create_task(outcome(fish.ask("before")))
        await in_hand(redis_server, 1)
        client.config_set("maxmemory", 1)
        assert await outcome(fish.ask("full")) == "busy"
        assert await before == "blub. before", "what is on the queue is still answered"
        await asyncio.sleep(queue.CLAIM_AFTER / 1000)
        client.config_set("maxmemory", 0)
        assert await outcome(fish.ask("after")) == "blub. after"


@pytest.mark.parametrize("refusal", ["READONLY", "WRONGPASS"])
async def test_a_redis_that_refuses_for_a_while_is_an_outage_and_nobody_ends(
    settings: Settings,
    redis_server: RedisServer,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
    refusal: str,
) -> None:
    """It became a replica, or got a password that we don't have (yet)."""
    monkeypatch.setattr(queue, "PATIENCE", 0.5)
    client = redis_server.client()
    worker = start_worker()
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        assert await outcome(fish.ask("before")) == "blub. before"
        if refusal == "READONLY":
            client.replicaof("127.0.0.1", redis_server.port + 1)
        else:
            client.config_set("requirepass", "another")
            client.client_kill_filter(_type="normal", skipme=True)
        assert await outcome(fish.ask("meanwhile")) == "asleep"
        await worker.logs(refusal)
        if refusal == "READONLY":
            client.replicaof("NO", "ONE")
        else:
            client.config_set("requirepass", "")
        await until(lambda: fish._away_since is None)
        assert await outcome(fish.ask("after")) == "blub. after"
    assert worker.process.poll() is None


async def test_an_adapter_that_dies_leaves_nothing_behind(
    redis_server: RedisServer, start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker(step_ms=100, tokens=10)
    await awake(redis_server)
    adapter = Process(
        ["-m", "tests.standins.asker", "--questions", "20"],
        tmp_path / "adapter",
        {"GUPPY_REDIS_URL": redis_server.url, "GUPPY_DEADLINE": "3"},
    )
    client = redis_server.client()
    await until(lambda: client.xlen(REQUESTS) == 20)
    adapter.process.kill()
    await until(lambda: client.xlen(REQUESTS) == 0)
    await until(lambda: not client.keys("{guppy}:text:*") and not client.keys("{guppy}:replies:*"), within=5)
    worker.process.terminate()
    assert await asyncio.to_thread(worker.exit_code) == 0
    client.pexpire(REQUESTS, 1)  # it would live for a minute more
    client.pexpire(queue.WORKERS, 1)
    await until(lambda: client.dbsize() == 0)


async def test_a_reply_after_the_deadline_is_not_seen(settings: Settings, redis_server: RedisServer) -> None:
    async with (
        working(settings, StandInEngine(0.1, 15)) as engine,
        QueuedFish(settings.model_copy(update={"deadline": 0.7})) as fish,
    ):
        assert await outcome(fish.ask("slow")) == "asleep"
        await until(lambda: engine.steps >= 15)
        await until(lambda: redis_server.client().xlen(REQUESTS) == 0)
        assert not redis_server.client().keys("{guppy}:text:*")


async def test_sigterm_under_load_finishes_what_is_in_work_and_exits_0(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    worker = start_worker(step_ms=20, tokens=50, GUPPY_MAX_BATCH="8")
    await awake(redis_server)
    async with QueuedFish(settings) as fish:
        asking = [asyncio.create_task(outcome(fish.ask(f"{n}"))) for n in range(40)]
        await in_hand(redis_server, 8)
        worker.process.terminate()
        started = time.monotonic()
        assert await asyncio.to_thread(worker.exit_code) == 0
        assert time.monotonic() - started < 10
        answered = worker.log.read_text().count('"event": "answered"')
        assert answered > 0
        await until(lambda: answered == sum(task.done() for task in asking))
        start_worker()
        assert await asyncio.gather(*asking) == [f"blub. {n}" for n in range(40)]
    assert re.search(r'"tries": 2', worker.log.read_text()) is None


async def test_sigterm_while_waiting_for_redis_exits_0_at_once(
    redis_server: RedisServer, start_worker: StartWorker
) -> None:
    redis_server.kill()
    worker = start_worker()
    await worker.logs("redis is away")
    worker.process.terminate()
    assert await asyncio.to_thread(worker.exit_code, 3) == 0


async def test_old_and_new_processes_share_a_queue_while_an_upgrade_rolls(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker, tmp_path: Path
) -> None:
    """The new version speaks another protocol: who meets the other is told that the fish is busy, and nobody dies."""
    newer = (
        "import runpy, sys, bot.queue as q; q.VERSION = b'2'; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    )
    new = {"GUPPY_REDIS_URL": redis_server.url}
    workers = [start_worker(), Process(["-c", newer, "tests.standins.engine"], tmp_path / "new worker", new)]
    try:
        await awake(redis_server, 2)
        asking = ["tests.standins.asker", "--questions", "60", "--at-once", "60"]
        adapters = [
            Process(["-m", *asking], tmp_path / "old adapter", new),
            Process(["-c", newer, *asking], tmp_path / "new adapter", new),
        ]
        for adapter in adapters:
            assert await asyncio.to_thread(adapter.exit_code) == 0
            results = [json.loads(line) for line in adapter.log.read_text().splitlines() if '"question"' in line]
            outcomes = Counter(result["outcome"] for result in results)
            assert set(outcomes) == {"answered", "busy"}
            assert outcomes.total() == 60
            assert all(result["right"] for result in results)
        assert [worker.process.poll() for worker in workers] == [None, None]
        assert redis_server.client().xlen(REQUESTS) == 0
    finally:
        workers[1].process.kill()
        workers[1].process.wait()


async def test_two_workers_share_the_questions(
    settings: Settings, redis_server: RedisServer, start_worker: StartWorker
) -> None:
    workers = [start_worker(step_ms=10, tokens=10, GUPPY_MAX_BATCH="4") for _ in range(2)]
    await awake(redis_server, 2)
    async with QueuedFish(settings) as fish:
        assert await asyncio.gather(*(outcome(fish.ask(f"{n}")) for n in range(80))) == [
            f"blub. {n}" for n in range(80)
        ]
    for process in workers:
        process.process.terminate()
        assert await asyncio.to_thread(process.exit_code) == 0
    shares = [process.log.read_text().count('"event": "answered"') for process in workers]
    assert sum(shares) == 80
    assert min(shares) > 15
