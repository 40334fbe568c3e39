"""After a run no word of what was typed is left: in Redis, logs, metrics, crash reports or a process's memory."""

import asyncio
import gc
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from bot.fish import Confused
from bot.limits import RedisLimiter
from bot.local import load
from bot.queue import REQUESTS, QueuedFish
from bot.settings import Settings
from tests.bot.conftest import StartWorker
from tests.standins.processes import Process, awake, scrape, until, working
from tests.standins.redis_server import RedisServer, free_port

CANARY = "yellow-canary"
PERSON = "8138478876571" + "2384"  # in two, so that this line itself, which Python may cache, is not found


def everything_in(client: Any) -> str:
    """All that Redis would tell, and what it would write to disk."""
    parts: list[Any] = [client.slowlog_get(128), client.info("everything"), client.client_list()]
    for key in client.scan_iter():
        parts += [key, client.dump(key)]
        if client.type(key) == b"stream":
            parts += [client.xrange(key), client.xinfo_stream(key, full=True)]
    client.save()
    folder = client.config_get("dir")["dir"]
    return repr(parts) + repr((Path(folder) / "dump.rdb").read_bytes())


async def test_no_word_is_left_in_redis_logs_or_metrics(
    redis_server: RedisServer, start_worker: StartWorker, tmp_path: Path
) -> None:
    metrics_ports = [free_port(), free_port()]
    debug = {"GUPPY_LOG_LEVEL": "DEBUG", "GUPPY_REDIS_URL": redis_server.url}
    workers = [start_worker(hasty=3, GUPPY_LOG_LEVEL="DEBUG", GUPPY_METRICS_PORT=str(port)) for port in metrics_ports]
    await awake(redis_server, 2)
    redis_server.client().set("control", CANARY)
    assert CANARY in everything_in(redis_server.client())
    redis_server.client().delete("control")
    adapter = Process(["-m", "tests.standins.asker", "--name", CANARY], tmp_path / "adapter", debug)
    poison = Process(  # its questions fail, twice, with errors that quote them
        ["-m", "tests.standins.asker", "--name", f"(raise) {CANARY}", "--questions", "3"], tmp_path / "poison", debug
    )
    for process in (adapter, poison):
        assert await asyncio.to_thread(process.exit_code, 30) == 0
    client = redis_server.client()
    await until(lambda: client.xlen(REQUESTS) == 0)
    scraped = [await asyncio.to_thread(scrape, port) for port in metrics_ports]
    for worker in workers:
        worker.process.terminate()
        await asyncio.to_thread(worker.exit_code)

    assert CANARY not in everything_in(client)
    assert 'guppy_work_total{outcome="answered"}' in scraped[0]
    assert CANARY not in "".join(scraped)
    for worker in workers:
        lines = worker.log.read_text().splitlines()
        assert lines
        assert all(json.loads(line) for line in lines)
        assert CANARY not in "".join(lines)
    assert sum(worker.log.read_text().count('"event": "failed"') for worker in workers) == 6
    for process, answered in ((adapter, 100), (poison, 0)):
        # The asker prints its results, with the questions, on standard output; its log lines are those with a level.
        lines = [line for line in process.log.read_text().splitlines() if '"level"' in line]
        assert sum('"outcome": "answered"' in line for line in lines) == answered
        assert CANARY not in "".join(lines)
        ids = {json.loads(line)["id"] for line in lines if '"asked"' in line}
        worked_on = "".join(worker.log.read_text() for worker in workers)
        assert ids
        assert all(id in worked_on for id in ids), "an id joins the lines of both ends"


async def test_no_word_is_left_in_the_memory_of_worker_and_adapter(
    settings: Settings, redis_server: RedisServer, hasty_here: None
) -> None:
    async with working(settings), QueuedFish(settings) as fish:

        async def ask(prompt: str) -> None:
            with suppress(Confused):
                await fish.ask(prompt)

        asking = asyncio.gather(*(ask(f"{CANARY} {n}") for n in range(50)), ask(f"(raise) {CANARY} "))
        await asyncio.sleep(0)
        assert len(left_in_memory(CANARY + " ")) >= 50, "while a question is open it is somewhere, and would be found"
        await asking
        del asking
        cancelled = asyncio.create_task(ask(f"{CANARY} cancelled"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        del cancelled
        await asyncio.sleep(1.5)
        assert left_in_memory(CANARY + " ") == []


async def test_no_word_is_left_in_the_memory_of_a_worker_with_the_fish_that_ships(settings: Settings) -> None:
    fish_that_ships = await load(settings)
    canary = set(fish_that_ships.chat.tokenizer.encode(CANARY).ids)
    async with working(settings, fish_that_ships), QueuedFish(settings) as fish:
        await asyncio.gather(*(fish.ask(f"{CANARY} {n}") for n in range(8)))
        assert left_in_memory(CANARY + " ") == []
        lists = [found for found in gc.get_objects() if type(found) is list and set(map(type, found)) == {int}]
        assert not [found for found in lists if canary <= set(found)], "nor the words as numbers"


def left_in_memory(word: str) -> list[str]:
    """The texts with `word` in them that any object of this process still holds."""
    gc.collect()
    found = []
    for holder in gc.get_objects():
        for value in gc.get_referents(holder):
            if type(value) is str and word in value and value is not word:
                found.append(f"{type(holder).__name__}: {value}")
            elif type(value) in (bytes, bytearray) and word.encode() in value:
                found.append(f"{type(holder).__name__}: {bytes(value)!r}")
    return found


async def test_no_persons_id_is_left_in_redis_or_memory(settings: Settings, redis_server: RedisServer) -> None:
    limits = RedisLimiter(settings, "discord", None)
    person = PERSON[:6] + PERSON[6:]
    async with limits.turn(person, f"message {person}") as turn:
        await turn.may_notice()
    del turn
    assert PERSON not in everything_in(redis_server.client())
    del person
    assert left_in_memory(PERSON) == []
    await limits.aclose()
