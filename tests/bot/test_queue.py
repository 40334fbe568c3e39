"""The queue keeps its word: `bot/queue.py`, between an adapter's end and a worker's end on a real Redis."""

import asyncio
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from bot.fish import Asleep, Busy, FishError, Reply
from bot.limits import RedisLimiter
from bot.queue import REQUESTS, Intake, QueuedFish, Request, UnknownVersion, Unreadable, decode
from bot.settings import Settings
from tests.standins.engine import StandInEngine
from tests.standins.processes import until, working
from tests.standins.redis_server import RedisServer

WITHOUT_DEADLINE = hypothesis_settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("guppy_work_total", {"outcome": outcome}) or 0.0


async def take_one(intake: Intake) -> Request:
    await intake.tend([], 0)
    while True:
        if taken := await intake.take(1):
            return taken[0]


async def test_each_question_gets_its_own_reply(settings: Settings) -> None:
    async with working(settings), QueuedFish(settings) as fish:
        replies = await asyncio.gather(*(fish.ask(f"question {n}") for n in range(200)))
    assert [reply.text for reply in replies] == [f"blub. question {n}" for n in range(200)]


async def test_several_adapters_share_a_worker_and_hear_only_their_own_replies(settings: Settings) -> None:
    async with working(settings), QueuedFish(settings) as one, QueuedFish(settings) as other:
        ones, others = await asyncio.gather(
            asyncio.gather(*(one.ask(f"one {n}") for n in range(50))),
            asyncio.gather(*(other.ask(f"other {n}") for n in range(50))),
        )
    assert {reply.text for reply in ones} == {f"blub. one {n}" for n in range(50)}
    assert {reply.text for reply in others} == {f"blub. other {n}" for n in range(50)}


async def test_a_reply_says_that_the_question_was_cut(settings: Settings) -> None:
    async with working(settings, StandInEngine(window=5)), QueuedFish(settings) as fish:
        assert await fish.ask("short") == Reply("blub. short", prompt_cut=False)
        assert await fish.ask("longer") == Reply("blub. longe", prompt_cut=True)


async def test_a_question_beyond_the_cap_is_refused_at_once(settings: Settings, redis_server: RedisServer) -> None:
    capped = settings.model_copy(update={"queue_cap": 3})
    async with QueuedFish(capped) as fish:
        waiting = [asyncio.create_task(fish.ask(f"{n}")) for n in range(3)]
        client = redis_server.client()
        await until(lambda: client.xlen(REQUESTS) == 3)
        with pytest.raises(Asleep):  # nobody works
            await asyncio.wait_for(fish.ask("one too many"), 1)
        intake = Intake(capped)
        await intake.tend([], 0)
        with pytest.raises(Busy):  # somebody does, but not fast enough
            await asyncio.wait_for(fish.ask("one too many"), 1)
        for task in waiting:
            task.cancel()
        await intake.aclose()


async def test_expired_questions_make_room_for_new_ones(settings: Settings) -> None:
    hasty = settings.model_copy(update={"queue_cap": 2, "deadline": 0.3})
    async with QueuedFish(hasty) as fish:
        results = await asyncio.gather(*(fish.ask("early") for _ in range(2)), return_exceptions=True)
        assert [type(result) for result in results] == [Asleep, Asleep]
        async with working(settings):
            assert (await fish.ask("late")).text == "blub. late"


async def test_the_same_question_twice_is_one_question(settings: Settings, redis_server: RedisServer) -> None:
    """After a lost connection an adapter asks again with the same id; Redis may have heard it the first time."""
    async with QueuedFish(settings) as fish:
        task = asyncio.create_task(fish.ask("hello"))
        client = redis_server.client()
        await until(lambda: client.xlen(REQUESTS) == 1)
        for question in list(fish._open.values()):
            await fish._submit(question)
        assert client.xlen(REQUESTS) == 1
        task.cancel()


async def test_nobody_answers_and_the_fish_is_asleep_at_the_deadline(settings: Settings) -> None:
    async with QueuedFish(settings.model_copy(update={"deadline": 0.5})) as fish:
        started = time.monotonic()
        with pytest.raises(Asleep):
            await fish.ask("anybody there")
        assert 0.5 <= time.monotonic() - started < 1.0


async def test_text_is_gone_at_the_deadline_without_anybodys_help(
    settings: Settings, redis_server: RedisServer
) -> None:
    fish = QueuedFish(settings.model_copy(update={"deadline": 0.5}))
    asking = asyncio.create_task(fish.ask("secret"))  # nobody listens: as if the adapter had died
    client = redis_server.client()
    await until(lambda: client.xlen(REQUESTS) == 1)
    assert len(client.keys("{guppy}:text:*")) == 1
    await asyncio.sleep(0.6)
    assert client.keys("{guppy}:text:*") == []
    with pytest.raises(Asleep):
        await asking


async def test_a_withdrawn_question_leaves_no_text_and_costs_no_work(
    settings: Settings, redis_server: RedisServer
) -> None:
    before = counted("expired")
    async with QueuedFish(settings) as fish:
        task = asyncio.create_task(fish.ask("never mind"))
        client = redis_server.client()
        await until(lambda: len(client.keys("{guppy}:text:*")) == 1)
        task.cancel()
        await until(lambda: not client.keys("{guppy}:text:*"))
        async with working(settings) as engine:
            await until(lambda: client.xlen(REQUESTS) == 0)
            assert engine.steps == 0
    assert counted("expired") == before + 1


async def test_the_streams_never_hold_text_and_every_key_has_an_end(
    settings: Settings, redis_server: RedisServer
) -> None:
    seen: set[bytes] = set()
    client = redis_server.client()
    async with working(settings, StandInEngine(0.005, 10)), QueuedFish(settings) as fish:
        asking = asyncio.gather(*(fish.ask(f"canary {n}") for n in range(50)))
        while not asking.done():
            for key in client.scan_iter():
                assert client.pttl(key) > 0 or not client.exists(key), key
                seen.add(client.type(key) + b" " + b":".join(key.split(b":")[:2]))
                if client.type(key) == b"stream":
                    assert b"canary" not in repr(client.xrange(key)).encode()
            await asyncio.sleep(0.01)
        await asking
    seen -= {b"none {guppy}:text", b"none {guppy}:replies", b"stream {guppy}:replies"}  # too short-lived to rely on
    assert seen == {b"stream {guppy}:requests", b"string {guppy}:text", b"zset {guppy}:workers"}
    assert client.xlen(REQUESTS) == 0
    assert client.keys("{guppy}:text:*") == client.keys("{guppy}:replies:*") == []


async def test_the_first_answer_wins_and_the_second_is_never_seen(settings: Settings) -> None:
    async with QueuedFish(settings) as fish:
        asking = asyncio.create_task(fish.ask("who is first"))
        intake = Intake(settings)
        request = await take_one(intake)
        await intake.answer(request, Reply("i am"))
        before = counted("overtaken")
        await intake.answer(request, Reply("no, i am"))
        assert (await asking).text == "i am"
        assert counted("overtaken") == before + 1
        await intake.aclose()


async def test_an_answer_after_the_deadline_goes_nowhere(settings: Settings, redis_server: RedisServer) -> None:
    async with QueuedFish(settings.model_copy(update={"deadline": 0.5})) as fish:
        asking = asyncio.create_task(fish.ask("quick"))
        intake = Intake(settings)
        request = await take_one(intake)
        with pytest.raises(Asleep):
            await asking
        await asyncio.sleep(0.05)  # Redis heard of the question a little later than it was asked
        before = counted("expired")
        await intake.answer(request, Reply("sorry, i was eating"))
        assert counted("expired") == before + 1
        assert redis_server.client().keys("{guppy}:text:*") == []
        assert redis_server.client().keys("{guppy}:replies:*") == []
        await intake.aclose()


async def test_deadlines_need_no_agreement_about_the_time_of_day(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.0)
    async with working(settings), QueuedFish(settings) as fish:
        assert (await fish.ask("what year is it")).text == "blub. what year is it"


async def test_an_empty_reply_never_reaches_a_person(settings: Settings) -> None:
    async with QueuedFish(settings) as fish:
        asking = asyncio.create_task(fish.ask("say nothing"))
        intake = Intake(settings)
        await intake.answer(await take_one(intake), Reply(""))
        with pytest.raises(FishError):
            await asking
        await intake.aclose()


async def test_a_question_of_an_unknown_version_is_refused_as_busy(
    settings: Settings, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the middle of an upgrade: a new adapter, an old worker."""
    async with QueuedFish(settings) as fish:
        with monkeypatch.context() as newer:
            newer.setattr("bot.queue.VERSION", b"2")
            asking = asyncio.create_task(fish.ask("from the future"))
            await until(lambda: redis_server.client().xlen(REQUESTS) == 1)
        async with working(settings):
            with pytest.raises(Busy):
                await asking
            assert (await fish.ask("from today")).text == "blub. from today"


async def test_a_reply_of_an_unknown_version_is_a_busy_fish(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with QueuedFish(settings) as fish:
        asking = asyncio.create_task(fish.ask("what will you say"))
        intake = Intake(settings)
        request = await take_one(intake)
        with monkeypatch.context() as newer:
            newer.setattr("bot.queue.VERSION", b"2")
            await intake.answer(request, Reply("something new"))
        with pytest.raises(Busy):
            await asking
        await intake.aclose()


async def test_a_cluster_keeps_every_key_on_one_node(tmp_path: Path) -> None:
    """Redis itself refuses a script there whose keys lie apart, or that touches a key it didn't name."""
    server = RedisServer(tmp_path, "--cluster-enabled", "yes").start()
    try:
        client = server.client()
        client.execute_command("CLUSTER ADDSLOTS", *range(16384))
        await until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        settings = Settings.model_validate({"redis_url": server.url})
        limits = RedisLimiter(settings, "discord", None)
        async with working(settings), QueuedFish(settings) as fish, limits.turn("anna", "1") as turn:
            assert await turn.may_notice()
            assert (await fish.ask("where are you")).text == "blub. where are you"
        slots = {client.execute_command("CLUSTER KEYSLOT", key) for key in client.scan_iter()}
        assert len(slots) == 1
        await limits.aclose()
    finally:
        server.kill()


anything = st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=80)), min_size=1, max_size=6)
nearly = st.fixed_dictionaries(
    {},
    optional={
        b"v": st.sampled_from([b"1", b"2", b"", b"\xff"]),
        b"id": st.sampled_from([b"0" * 32, b"0" * 31, b"Z" * 32, b"{guppy}:requests"]),
        b"replies": st.sampled_from([b"{guppy}:replies:" + b"0" * 32, b"{guppy}:requests", b"\x00"]),
        b"deadline": st.sampled_from([b"0", b"-1", b"nan", b"1e400", b"x"]),
        b"text": st.binary(max_size=20),
    },
).map(lambda fields: list(fields.items()))


@given(fields=st.one_of(anything, nearly))
def test_whatever_stands_in_an_entry_is_a_request_or_one_of_two_errors(fields: list[tuple[bytes, bytes]]) -> None:
    flat = [part for pair in fields for part in pair]
    try:
        request = decode(b"1-1", flat)
    except Unreadable:
        return
    except UnknownVersion as unknown:
        request = unknown.request
    assert len(request.id) == 32
    assert request.replies.startswith("{guppy}:replies:")


@WITHOUT_DEADLINE
@given(entries=st.lists(st.one_of(anything, nearly).filter(bool), min_size=1, max_size=10))
async def test_no_entry_kills_a_worker(
    settings: Settings, redis_server: RedisServer, entries: list[list[tuple[bytes, bytes]]]
) -> None:
    client, intake = redis_server.client(), Intake(settings)
    await intake.tend([], 0)
    for fields in entries:
        client.execute_command("XADD", REQUESTS, "*", *(part for pair in fields for part in pair))
    async with QueuedFish(settings) as fish:
        asking = asyncio.create_task(fish.ask("still there"))
        await intake.answer(await take_one(intake), Reply("yes"))
        assert (await asking).text == "yes"
    assert client.xlen(REQUESTS) == 0
    await intake.aclose()


@WITHOUT_DEADLINE
@given(prompt=st.text(st.characters(), max_size=300))
async def test_any_text_arrives_as_it_was_typed(settings: Settings, prompt: str) -> None:
    """Any Unicode at all; half of a surrogate pair, which no text may hold, becomes a question mark."""
    intake = Intake(settings)
    async with QueuedFish(settings) as fish:
        asking = asyncio.create_task(fish.ask(prompt))
        request = await take_one(intake)
        await intake.answer(request, Reply("." + request.prompt))
        assert (await asking).text == "." + prompt.encode("utf-8", "replace").decode()
    await intake.aclose()


@WITHOUT_DEADLINE
@given(fields=anything, text=st.binary(max_size=50))
async def test_no_notice_kills_an_adapter(
    settings: Settings, redis_server: RedisServer, fields: list[tuple[bytes, bytes]], text: bytes
) -> None:
    client, intake = redis_server.client(), Intake(settings)
    async with QueuedFish(settings) as fish:
        client.execute_command("XADD", fish._replies, "*", *(part for pair in fields for part in pair))
        client.execute_command("XADD", fish._replies, "*", "id", text, "v", "1", "outcome", text)
        asking = asyncio.create_task(fish.ask("still there"))
        await intake.answer(await take_one(intake), Reply("yes"))
        assert (await asking).text == "yes"
    await intake.aclose()


async def test_bytes_that_are_no_text_are_answered_all_the_same(settings: Settings, redis_server: RedisServer) -> None:
    client = redis_server.client()
    async with QueuedFish(settings) as fish:
        asking = asyncio.create_task(fish.ask("x"))
        await until(lambda: bool(client.keys("{guppy}:text:*")))
        client.set(client.keys("{guppy}:text:*")[0], b"\xff\xfe\x00", keepttl=True)
        async with working(settings):
            assert "\x00" in (await asking).text
