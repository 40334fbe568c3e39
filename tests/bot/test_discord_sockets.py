"""Discord over real sockets: the real client against a gateway that drops, resumes and replays, and REST that fails."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web
from discord import Permissions
from discord.backoff import ExponentialBackoff
from prometheus_client import REGISTRY

from bot import discord as adapter
from bot import health, voice
from bot.fish import Asleep, Fish, FishError, Reply
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings
from tests.bot.conftest import StartWorker
from tests.standins.discord import BOT, CHANNEL, DIRECT, PERSON, TOKEN, DiscordServer, Session, error, person, too_many
from tests.standins.processes import Process, until
from tests.standins.redis_server import RedisServer


class StandInFish:
    """Answers every question with itself, after some seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[str] = []
        self.seconds = seconds
        self.error: FishError | None = None

    async def ask(self, prompt: str) -> Reply:
        self.asked.append(prompt)
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return Reply(f"blub. {prompt}")


def settings(server: DiscordServer, **values: object) -> Settings:
    named = {name.removeprefix("GUPPY_").lower(): value for name, value in server.environment.items()}
    return Settings.model_validate({**named, "person_per_minute": 1000, "person_burst": 100, **values})


@asynccontextmanager
async def serving(server: DiscordServer, fish: Fish, **values: object) -> AsyncIterator[asyncio.Event]:
    """The adapter at work; leaving the block stops it as SIGTERM does. Yields `stop`."""
    stop = asyncio.Event()
    running = asyncio.create_task(adapter.serve(settings(server, **values), fish, stop))
    try:
        await asyncio.wait([running, asyncio.ensure_future(server.connected())], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(running, 9)


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("guppy_questions_total", {"platform": "discord", "outcome": outcome}) or 0


async def test_a_mention_is_answered_as_a_reply_that_pings_nobody_and_carries_a_nonce() -> None:
    async with DiscordServer() as server:
        async with serving(server, StandInFish()):
            message = await server.say("are you hungry")
            assert await server.reply_to(message) == "blub. are you hungry"
        sent = server.posted[0]["sent"]
    assert sent["allowed_mentions"] == {"parse": [], "replied_user": False}
    assert sent["nonce"] == message
    assert sent["enforce_nonce"] is True


async def test_a_command_is_deferred_and_answered() -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        command = await server.command("guppy", message="hello")
        assert await server.answer_to(command) == "blub. hello"
        assert not server.interactions[command]["hidden"]
        hidden = await server.command("guppy", message="psst", hidden=True)
        assert await server.answer_to(hidden) == "blub. psst"
        assert server.interactions[hidden]["hidden"]
        for name in ("help", "about", "privacy"):
            told = await server.command(name)
            assert len(await server.answer_to(told)) > 100
            assert server.interactions[told]["hidden"]


@pytest.mark.parametrize("where", ["direct", "group", "elsewhere"])
async def test_who_added_him_for_themselves_can_use_him_everywhere(where: str) -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        command = await server.command("guppy", where=where, message="hello")
        assert await server.answer_to(command) == "blub. hello"
        about = await server.command("about", where=where)
        assert await server.answer_to(about) == voice.say("about")


async def test_fixed_texts_follow_the_language_of_the_person() -> None:
    fish = StandInFish()
    async with DiscordServer() as server, serving(server, fish):
        for locale, language in (("de", "de"), ("fr", "en"), ("en-GB", "en")):
            assert await server.answer_to(await server.command("privacy", locale)) == voice.say("privacy", language)
        fish.error = Asleep()
        told = await server.answer_to(await server.command("guppy", "de", message="hello"))
        assert told in voice.variants("asleep", "de")


@pytest.mark.parametrize("how", ["cut", "close", "reconnect"])
async def test_across_a_reconnect_with_replay_no_reply_is_lost_or_doubled(how: str) -> None:
    fish = StandInFish(seconds=0.3)
    async with DiscordServer() as server, serving(server, fish):
        before = await server.say("before")
        await server.reply_to(before)
        thinking = await server.say("thinking", author=person(1))
        await until(lambda: "thinking" in fish.asked)
        if how == "cut":
            server.drop()
        elif how == "close":
            await server.close_sessions(4000)
        else:
            await server.ask_to_reconnect()
        meanwhile = await server.say("meanwhile", author=person(2))
        await server.connected()
        assert len(server.resumes) == 1
        # A gateway may send again what the client has had: all of it, as if nothing had been acknowledged.
        session = next(iter(server.sessions.values()))
        for event in [event for event in session.events if event["t"] == "MESSAGE_CREATE"]:
            await server.dispatch("MESSAGE_CREATE", event["d"])
        after = await server.say("after", author=person(3))
        for message, words in ((before, "before"), (thinking, "thinking"), (meanwhile, "meanwhile"), (after, "after")):
            assert await server.reply_to(message) == f"blub. {words}"
        await asyncio.sleep(0.5)
        assert len(server.posted) == 4
        assert sorted(fish.asked) == ["after", "before", "meanwhile", "thinking"]
        assert len(server.identifies) == 1


async def test_a_session_that_is_lost_is_begun_anew() -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        await server.reply_to(await server.say("one"))
        server.forget_sessions()
        await server.connected(within=60)
        assert len(server.identifies) == 2
        assert await server.reply_to(await server.say("two")) == "blub. two"


async def test_a_reply_whose_connection_breaks_is_sent_again_and_posted_once() -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        faults = ["break"]
        server.faults.append(lambda _, path: faults.pop() if path.endswith("/messages") and faults else None)
        message = await server.say("are you there")
        await until(lambda: server.count("POST", "/messages") == 2)
        assert server.replies(message) == ["blub. are you there"]


async def test_a_reply_that_discord_fails_on_is_sent_again_and_posted_once() -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        faults = [web.Response(status=502)]
        server.faults.append(lambda _, path: faults.pop() if path.endswith("/messages") and faults else None)
        message = await server.say("are you there")
        assert await server.reply_to(message) == "blub. are you there"
        assert server.count("POST", "/messages") == 2


async def test_failing_commands_and_typing_stop_nothing() -> None:
    async with DiscordServer() as server:
        server.faults.append(lambda _, path: error(403, 50001) if path.endswith(("/typing", "/commands")) else None)
        async with serving(server, StandInFish()):
            message = await server.say("hello")
            assert await server.reply_to(message) == "blub. hello"
            assert server.count("PUT", "/commands") == 1


async def test_a_typing_call_that_hangs_holds_up_nothing() -> None:
    async with DiscordServer() as server:
        server.hang.add("/typing")
        async with serving(server, StandInFish()):
            assert await server.reply_to(await server.say("hello"), within=3) == "blub. hello"


async def test_typing_shows_while_he_thinks_and_not_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "TYPING", 0.4)
    async with DiscordServer() as server, serving(server, StandInFish(seconds=0.6)):
        message = await server.say("hello")
        await server.reply_to(message)
        assert [path.rsplit("/", 1)[1] for _, path in server.requests[-3:]] == ["typing", "typing", "messages"]
        await asyncio.sleep(0.6)
        assert server.count("POST", "/typing") == 2


@pytest.mark.parametrize(("status", "code"), [(403, 50013), (403, 50083), (404, 10003), (400, 160002), (400, 200000)])
async def test_a_reply_that_discord_refuses_is_dropped_and_counted(status: int, code: int) -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        server.faults.append(lambda _, path: error(status, code) if path.endswith("/messages") else None)
        before = counted("undeliverable")
        await server.say("hello")
        await until(lambda: counted("undeliverable") == before + 1)
        await asyncio.sleep(0.3)
        assert server.count("POST", "/messages") == 1
        server.faults.clear()
        assert await server.reply_to(await server.say("again")) == "blub. again"


async def test_a_channel_that_refuses_is_left_alone() -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        server.faults.append(lambda _, path: error(403, 50013) if path.endswith("/messages") else None)
        for n in range(12):
            await server.say(f"hello {n}")
            await asyncio.sleep(0.05)
        assert server.count("POST", "/messages") <= 3


async def test_a_deleted_question_is_dropped() -> None:
    async with DiscordServer() as server, serving(server, StandInFish(seconds=0.2)):
        before = counted("undeliverable")
        server.deleted.add(await server.say("hello"))
        await until(lambda: counted("undeliverable") == before + 1)
        assert not server.posted


@pytest.mark.parametrize("code", [10062, 40060])
async def test_an_expired_or_taken_interaction_is_dropped(code: int) -> None:
    fish = StandInFish()
    async with DiscordServer() as server, serving(server, fish):
        before = counted("undeliverable")
        server.faults.append(lambda _, path: error(404, code) if path.endswith("/callback") else None)
        await server.command("guppy", message="hello")
        await until(lambda: counted("undeliverable") == before + 1)
        assert server.count("POST", "/callback") == 1
        assert not fish.asked


async def test_a_flood_limit_within_the_deadline_is_waited_for_and_counted() -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        before = REGISTRY.get_sample_value("guppy_platform_rate_limited_total", {"platform": "discord"}) or 0
        faults = [too_many(0.3)]
        server.faults.append(lambda _, path: faults.pop() if path.endswith("/messages") and faults else None)
        assert await server.reply_to(await server.say("hello")) == "blub. hello"
        after = REGISTRY.get_sample_value("guppy_platform_rate_limited_total", {"platform": "discord"})
        assert after == before + 1


@pytest.mark.parametrize("seconds", [20.0, 120.0])
async def test_a_flood_limit_beyond_the_deadline_drops_the_reply(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "DELIVERY", 0.5)
    async with DiscordServer() as server, serving(server, StandInFish(), deadline=1):
        server.faults.append(lambda _, path: too_many(seconds) if path.endswith("/messages") else None)
        before = counted("undeliverable")
        await server.say("hello")
        await until(lambda: counted("undeliverable") == before + 1)
        assert server.count("POST", "/messages") == 1


async def test_what_was_said_before_a_long_outage_is_not_answered() -> None:
    async with DiscordServer() as server, serving(server, StandInFish()):
        old = await server.say("old", seconds_ago=300)
        assert await server.reply_to(await server.say("new")) == "blub. new"
        assert server.replies(old) == []


async def test_commands_are_registered_once_and_again_only_when_they_changed() -> None:
    async with DiscordServer() as server:
        for _ in range(2):
            async with serving(server, StandInFish()):
                pass
        assert server.count("PUT", "/commands") == 1
        server.commands[0]["description"] = "something older"
        async with serving(server, StandInFish()):
            pass
        assert server.count("PUT", "/commands") == 2
        for command in server.commands:
            assert command["integration_types"] == [0, 1]
            assert command["contexts"] == [0, 1, 2]
            if command["type"] == 1:
                assert command["description_localizations"]["de"]


async def test_stopping_answers_what_is_in_hand_and_takes_nothing_more() -> None:
    fish = StandInFish(seconds=1)
    async with DiscordServer() as server:
        async with serving(server, fish) as stop:
            message = await server.say("in hand", author=person(1))
            command = await server.command("guppy", message="in hand too")
            await until(lambda: len(fish.asked) == 2)
            stop.set()
            await asyncio.sleep(0.1)
            late = await server.say("too late")
        assert server.replies(message) == ["blub. in hand"]
        assert server.interactions[command]["answer"] == "blub. in hand too"
        assert server.replies(late) == []


async def test_a_gateway_that_falls_silent_does_not_hold_up_the_stop() -> None:
    async with DiscordServer() as server:
        async with serving(server, StandInFish()):
            await server.reply_to(await server.say("hello"))
            server.ignores_close = True
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 8


async def test_a_wrong_token_is_one_sentence_and_no_session() -> None:
    async with DiscordServer() as server:
        with pytest.raises(Refusal) as refused:
            async with serving(server, StandInFish(), discord_token="not.the.token"):
                pass
        assert refused.value.exit_code is ExitCode.TOKEN
        assert "GUPPY_DISCORD_TOKEN" in refused.value.sentence
        assert not server.identifies


@pytest.mark.parametrize(("flags", "identifies"), [(1 << 23, 0), (0, 1)])
async def test_a_home_channel_without_the_intent_is_one_sentence(flags: int, identifies: int) -> None:
    async with DiscordServer(flags=flags) as server:
        with pytest.raises(Refusal) as refused:
            async with serving(server, StandInFish(), discord_home_channels={CHANNEL}):
                pass
        assert refused.value.exit_code is ExitCode.TOKEN
        assert "Message Content" in refused.value.sentence
        assert len(server.identifies) == identifies


async def test_in_a_home_channel_everything_is_answered() -> None:
    async with (
        DiscordServer(flags=1 << 19, allowed_intents=~0) as server,
        serving(server, StandInFish(), discord_home_channels={CHANNEL}),
    ):
        assert await server.reply_to(await server.say("just talking", mention=False)) == "blub. just talking"


class SparseServer(DiscordServer):
    """A server that says no more than it must, as others than Discord may."""

    async def _emit(self, session: Session, event: str, data: dict[str, Any]) -> None:
        if event == "GUILD_CREATE":
            return
        if event == "READY":
            data = {key: value for key, value in data.items() if key != "shard"} | {"guilds": []}
        await super()._emit(session, event, data)


async def test_a_server_of_few_words_is_understood() -> None:
    async with SparseServer() as server:
        server.faults.append(lambda _, path: error(404, 0) if path.endswith(("/gateway/bot", "/commands")) else None)
        async with serving(server, StandInFish()):
            assert await server.reply_to(await server.say("hello", id="1001")) == "blub. hello"
            assert await server.reply_to(await server.say("hello you", direct=True, id="1002")) == "blub. hello you"


async def test_shards_are_as_many_as_discord_recommends_or_as_set() -> None:
    async with DiscordServer(shards=2) as server:
        server.faults.append(lambda _, path: None)
        async with serving(server, StandInFish()):
            await server.connected(2, within=60)
            assert [identify["shard"] for identify in server.identifies] == [[0, 2], [1, 2]]
        async with serving(server, StandInFish(), discord_shards=1):
            assert server.identifies[-1]["shard"] == [0, 1]


async def test_when_the_starts_of_the_day_are_used_up_he_waits() -> None:
    async with DiscordServer() as server:
        server.starts_left = 0
        began = asyncio.get_running_loop().time()
        async with serving(server, StandInFish()):
            assert asyncio.get_running_loop().time() - began >= 1


async def test_presence_is_idle_while_no_worker_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "KNOCK", 0.5)
    fish = StandInFish()
    async with DiscordServer() as server, serving(server, fish):
        session = next(iter(server.sessions.values()))
        assert session.presences == ["online"]
        assert server.identifies[0]["presence"]["game"]["state"] == voice.say("presence")
        fish.error = Asleep()
        message = await server.say("hello")
        assert await server.reply_to(message) in voice.variants("asleep")
        await until(lambda: session.presences[-1] == "idle")
        fish.error = None
        await until(lambda: session.presences[-1] == "online")  # nobody had to ask


async def test_health_follows_the_connection_and_not_the_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "STALE", 0.8)
    monkeypatch.setattr(health, "BEAT", 0.2)
    monkeypatch.setattr(ExponentialBackoff, "delay", lambda _: 0.3)  # the library's own pauses, of up to minutes
    async with DiscordServer() as server:
        server.acknowledges = False  # the latency is then infinite
        async with serving(server, StandInFish()):
            await until(lambda: health.check("discord") is None)
            server.refuse_gateway = True
            server.drop()
            await until(lambda: health.check("discord") is not None)
            server.refuse_gateway = False
            await until(lambda: health.check("discord") is None, within=60)
    assert health.check("discord") is not None


async def test_an_api_that_is_away_is_waited_for() -> None:
    async with DiscordServer() as server:
        faults = [web.Response(status=503)]
        server.faults.append(lambda _, path: faults.pop() if path.endswith("/users/@me") and faults else None)
        async with serving(server, StandInFish()):
            assert await server.reply_to(await server.say("hello")) == "blub. hello"


async def test_the_invite_links_ask_for_the_least() -> None:
    async with DiscordServer() as server:
        told = await adapter.invite(settings(server))
        _, to_server, _, to_oneself = told.splitlines()
        query = parse_qs(urlsplit(to_server).query)
        assert query["client_id"] == [str(BOT)]
        assert query["scope"] == ["bot applications.commands"]
        granted = Permissions(int(query["permissions"][0]))
        assert granted == Permissions(
            view_channel=True, send_messages=True, send_messages_in_threads=True, read_message_history=True
        )
        assert parse_qs(urlsplit(to_oneself).query)["integration_type"] == ["1"]
        assert server.count("PUT", "/commands") == 0
        with pytest.raises(Refusal):
            await adapter.invite(settings(server, discord_token="not.the.token"))


# --- the processes, as they run in a deployment


@pytest.fixture
def adapter_process(redis_server: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start `python -m bot discord` on a Discord of the test: `adapter_process(server, GUPPY_DEADLINE="5")`."""
    started: list[Process] = []

    def start(server: DiscordServer, role: str = "discord", **environment: str) -> Process:
        named = {"GUPPY_REDIS_URL": redis_server.url, **server.environment, **environment}
        process = Process(["-m", "bot", role], tmp_path / f"discord{len(started)}", named)
        started.append(process)
        return process

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()


async def test_a_question_goes_through_adapter_queue_and_worker_and_back(
    adapter_process: Callable[..., Process], start_worker: StartWorker
) -> None:
    async with DiscordServer() as server:
        worker, process = start_worker(), adapter_process(server)
        await server.connected(within=60)
        assert (
            await server.reply_to(await server.say("are you hungry canary-7261")) == "blub. are you hungry canary-7261"
        )
        assert await server.answer_to(await server.command("guppy", message="canary-7261")) == "blub. canary-7261"
        process.process.terminate()
        assert process.exit_code() == 0
        log = process.log.read_text()
    assert f"client_id={BOT}" in log  # the link by which people add him, where the operator looks first
    for private in ("canary-7261", TOKEN, str(PERSON), "alice", str(DIRECT)):
        assert private not in log
        assert private not in worker.log.read_text()


async def test_sigterm_answers_what_is_in_flight(
    adapter_process: Callable[..., Process], start_worker: StartWorker
) -> None:
    async with DiscordServer() as server:
        start_worker(step_ms=100, tokens=10)
        process = adapter_process(server)
        await server.connected(within=60)
        message = await server.say("hello")
        await until(lambda: server.count("POST", "/typing") == 1)
        process.process.terminate()
        assert await asyncio.to_thread(process.exit_code) == 0
        assert server.replies(message) == ["blub. hello"]


async def test_two_processes_with_one_token_give_one_reply(
    adapter_process: Callable[..., Process], start_worker: StartWorker
) -> None:
    async with DiscordServer() as server:
        start_worker()
        for _ in range(2):
            adapter_process(server)
        await server.connected(2, within=60)
        messages = [await server.say(f"hello {n}", author=person(n + 1)) for n in range(5)]
        for n, message in enumerate(messages):
            assert await server.reply_to(message) == f"blub. hello {n}"
        await asyncio.sleep(1)
        assert server.count("POST", "/messages") == 5


async def test_the_gateway_is_not_opened_before_redis_is_there(
    adapter_process: Callable[..., Process], redis_server: RedisServer, start_worker: StartWorker
) -> None:
    redis_server.kill()
    async with DiscordServer() as server:
        await adapter_process(server).logs("redis is away")
        await asyncio.sleep(1)
        assert server.requests == []
        redis_server.start()
        start_worker()
        await server.connected(within=60)
        assert await server.reply_to(await server.say("hello")) == "blub. hello"


async def test_a_wrong_token_ends_the_process_with_one_sentence(adapter_process: Callable[..., Process]) -> None:
    async with DiscordServer() as server:
        process = adapter_process(server, GUPPY_DISCORD_TOKEN="not.the.token")
        assert await asyncio.to_thread(process.exit_code, 30) == ExitCode.TOKEN
        assert process.log.read_text().splitlines()[-1].startswith("guppy: Discord refuses GUPPY_DISCORD_TOKEN.")
        assert "Traceback" not in process.log.read_text()
        assert "not.the.token" not in process.log.read_text()


@pytest.mark.parametrize("command", ["bot invite", "guppylm bot invite"])
async def test_the_invite_command_prints_the_links(command: str, tmp_path: Path) -> None:
    async with DiscordServer() as server:
        process = Process(["-m", *command.split()], tmp_path, server.environment)
        assert await asyncio.to_thread(process.exit_code, 30) == 0
        assert f"client_id={BOT}" in process.log.read_text()
        assert len(process.log.read_text().splitlines()) == 4


async def test_the_invite_command_says_what_is_wrong(tmp_path: Path) -> None:
    async with DiscordServer() as server:
        wrong = server.environment | {"GUPPY_DISCORD_TOKEN": "not.the.token"}
        process = Process(["-m", "guppylm", "bot", "invite"], tmp_path, wrong)
        assert await asyncio.to_thread(process.exit_code, 30) == ExitCode.TOKEN
        assert process.log.read_text().startswith("guppy: Discord refuses GUPPY_DISCORD_TOKEN.")
