"""How much one person may ask: `bot/limits.py`, in one process and across processes."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
from pydantic import SecretStr

from bot.limits import Limiter, LocalLimiter, RedisLimiter, Verdict, limiter
from bot.queue import QueuedFish
from bot.settings import Settings
from tests.standins.engine import StandInEngine
from tests.standins.processes import working
from tests.standins.redis_server import RedisServer

messages = map(str, itertools.count())


@pytest.fixture
def limited(settings: Settings) -> Settings:
    """Three at once, one more each half second."""
    return settings.model_copy(update={"person_burst": 3, "person_per_minute": 120.0})


@pytest.fixture(params=["local", "redis"])
async def limits(request: pytest.FixtureRequest, limited: Settings) -> AsyncIterator[Limiter]:
    made: Limiter = LocalLimiter(limited) if request.param == "local" else RedisLimiter(limited, "discord", None)
    yield made
    await made.aclose()


async def verdict(limits: Limiter, person: str, message: str | None = None) -> Verdict:
    async with limits.turn(person, message or next(messages)) as turn:
        return turn.verdict


async def test_a_burst_is_welcome_then_it_is_too_fast_then_welcome_again(limits: Limiter) -> None:
    assert [await verdict(limits, "anna") for _ in range(4)] == [Verdict.WELCOME] * 3 + [Verdict.TOO_FAST]
    assert await verdict(limits, "ben") is Verdict.WELCOME
    await asyncio.sleep(0.55)
    assert [await verdict(limits, "anna") for _ in range(2)] == [Verdict.WELCOME, Verdict.TOO_FAST]


async def test_one_question_of_a_person_is_open_at_a_time(limits: Limiter) -> None:
    async with limits.turn("anna", "1") as first:
        assert first.verdict is Verdict.WELCOME
        assert await verdict(limits, "anna", "2") is Verdict.STILL_THINKING
        assert await verdict(limits, "ben", "3") is Verdict.WELCOME
    assert await verdict(limits, "anna", "4") is Verdict.WELCOME


async def test_a_turn_ends_however_its_block_ends(limits: Limiter) -> None:
    with pytest.raises(ZeroDivisionError):
        async with limits.turn("anna", "1"):
            raise ZeroDivisionError
    task = asyncio.create_task(hold(limits, "anna", "2", asyncio.Event()))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await verdict(limits, "anna", "3") is Verdict.WELCOME


async def hold(limits: Limiter, person: str, message: str, until: asyncio.Event) -> Verdict:
    async with limits.turn(person, message) as turn:
        await until.wait()
        return turn.verdict


async def test_the_same_message_is_taken_once(limits: Limiter) -> None:
    assert await verdict(limits, "anna", "same") is Verdict.WELCOME
    assert await verdict(limits, "anna", "same") is Verdict.DUPLICATE


async def test_a_notice_is_given_once_a_minute(limits: Limiter) -> None:
    notices = []
    for person in ("anna", "anna", "ben", "anna"):
        async with limits.turn(person, next(messages)) as turn:
            notices.append(await turn.may_notice())
    assert notices == [True, False, True, False]


@pytest.fixture
async def two_processes(limited: Settings) -> AsyncIterator[tuple[Limiter, Limiter]]:
    """The limiters that two processes with the same token have."""
    with_token = limited.model_copy(update={"discord_token": SecretStr("a.discord.token")})
    pair = limiter(with_token, "discord"), limiter(with_token, "discord")
    yield pair
    for one in pair:
        await one.aclose()


async def test_limits_hold_across_processes(two_processes: tuple[Limiter, Limiter]) -> None:
    one, other = two_processes
    done = asyncio.Event()
    holding = asyncio.create_task(hold(one, "anna", "1", done))
    await asyncio.sleep(0.1)
    assert await verdict(other, "anna", "2") is Verdict.STILL_THINKING
    assert await verdict(other, "anna", "1") is Verdict.DUPLICATE, "both processes got the same message"
    done.set()
    assert await holding is Verdict.WELCOME
    assert [await verdict(each, "anna") for each in (one, other, one)] == [
        Verdict.WELCOME,
        Verdict.WELCOME,
        Verdict.TOO_FAST,
    ]
    async with one.turn("anna", "8") as here, other.turn("anna", "9") as there:
        assert [await here.may_notice(), await there.may_notice()] == [True, False]


async def test_a_message_that_came_to_two_processes_at_once_is_answered_by_one(
    two_processes: tuple[Limiter, Limiter],
) -> None:
    verdicts = await asyncio.gather(*(verdict(each, "anna", "same") for each in two_processes))
    assert sorted(verdicts) == [Verdict.DUPLICATE, Verdict.WELCOME]


async def test_limits_hold_in_this_process_while_redis_is_away(limited: Settings, redis_server: RedisServer) -> None:
    limits = RedisLimiter(limited, "telegram", None)
    assert await verdict(limits, "anna", "1") is Verdict.WELCOME
    redis_server.kill()
    assert await verdict(limits, "anna", "1") is Verdict.DUPLICATE
    assert [await verdict(limits, "anna") for _ in range(3)] == [Verdict.WELCOME] * 2 + [Verdict.TOO_FAST]
    async with limits.turn("anna", "9") as turn:
        assert [await turn.may_notice(), await turn.may_notice()] == [True, False]
    redis_server.start()
    assert await verdict(limits, "ben") is Verdict.WELCOME
    await limits.aclose()


async def test_nobodys_id_is_in_redis_and_everything_there_ends_soon(
    limited: Settings, redis_server: RedisServer
) -> None:
    limits = RedisLimiter(limited, "discord", None)
    client = redis_server.client()
    async with limits.turn("81384788765712384", "1096789012345678901") as turn:
        await turn.may_notice()
        keys = client.keys()
        assert len(keys) == 4
        for key in keys:
            assert 0 < client.pttl(key) <= 600_000
            assert b"81384788765712384" not in key + client.get(key)
            assert b"1096789012345678901" not in key + client.get(key)
    await limits.aclose()


async def test_a_person_has_another_name_in_another_hour(
    limited: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = RedisLimiter(limited, "discord", None)
    client = redis_server.client()

    async def names() -> set[bytes]:
        client.flushall()
        await verdict(limits, "anna")
        return set(client.keys("{guppy}:limit:rate:*"))

    now = time.time()
    first = await names()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert not await names() & first
    await limits.aclose()


async def test_without_redis_nothing_is_kept_for_long(limited: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LocalLimiter(limited)
    clock: Callable[[], float] = time.monotonic
    for n in range(100):
        async with limits.turn(f"person {n}", f"message {n}") as turn:
            await turn.may_notice()
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)
    await verdict(limits, "somebody else")
    assert len(limits._seen) == len(limits._full_again) == 1
    assert not limits._told


async def test_a_flood_of_one_leaves_the_others_as_quick_as_they_were(settings: Settings) -> None:
    """The flood alone is three times what the worker could answer."""
    few = settings.model_copy(update={"max_batch": 8})
    limits = RedisLimiter(few, "discord", None)
    flood: Counter[Verdict] = Counter()

    async def flooded(person: str) -> None:
        async with limits.turn(person, next(messages)) as turn:
            flood[turn.verdict] += 1
            if turn.verdict is Verdict.WELCOME:
                await fish.ask("me me me")

    async def chatting(number: int) -> list[float]:
        """Others come, each with one question after another."""
        seconds = []
        for n in range(4):
            await asyncio.sleep(random.uniform(0.2, 0.6))
            started = time.perf_counter()
            async with limits.turn(f"person {number}", next(messages)) as turn:
                assert turn.verdict is Verdict.WELCOME, n
                await fish.ask("are you hungry")
            seconds.append(time.perf_counter() - started)
        return seconds

    async def p99(first: int, storm: bool) -> float:
        talking = asyncio.gather(*(chatting(first + n) for n in range(25)))
        flooding = []
        while not talking.done():
            flooding += [asyncio.create_task(flooded("flooder")) for _ in range(25 if storm else 0)]
            await asyncio.sleep(0.05)
        await asyncio.gather(*flooding)
        return sorted(second for seconds in await talking for second in seconds)[98]

    async with working(few, StandInEngine(0.004, 12, max_batch=8)), QueuedFish(few) as fish:
        await p99(100, storm=False)  # warms up
        in_peace, in_the_flood = await p99(200, storm=False), await p99(300, storm=True)
    await limits.aclose()
    assert flood.total() > 500
    assert flood[Verdict.WELCOME] <= 5
    assert in_the_flood <= 1.5 * in_peace + 0.05  # a tick or two of a busy machine


async def test_a_flood_of_one_leaves_the_others_welcome(limits: Limiter) -> None:
    flood = [verdict(limits, "flooder") for _ in range(300)]
    others = [verdict(limits, f"person {n}") for n in range(50)]
    verdicts = await asyncio.gather(*flood, *others)
    assert verdicts[300:] == [Verdict.WELCOME] * 50
    assert verdicts[:300].count(Verdict.WELCOME) <= 3
