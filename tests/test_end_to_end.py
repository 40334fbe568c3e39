"""The whole way, as compose runs it: Redis, a worker with the fish that ships, and each adapter, all processes of their
own; a message on each platform, and the trained fish's reply."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bot import voice
from tests.standins.discord import DiscordServer
from tests.standins.processes import Process, awake
from tests.standins.redis_server import RedisServer
from tests.standins.telegram import TelegramServer

Start = Callable[..., Process]
CANNED = [line for key in ("asleep", "busy", "confused", "too_fast") for line in voice.variants(key)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `python -m bot ROLE` with these settings; all are ended after the test."""
    started: list[Process] = []

    def start(role: str, **environment: str) -> Process:
        started.append(Process(["-m", "bot", role], tmp_path / role, environment))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()


def sounds_like_guppy(reply: str) -> bool:
    """Lowercase words and full stops: what the trained fish says, and no line of the adapters' own."""
    return re.fullmatch(r"[a-z .,?'-]+", reply) is not None and reply not in CANNED


async def test_a_message_on_each_platform_is_answered_by_the_trained_fish(
    redis_server: RedisServer, start: Start
) -> None:
    async with DiscordServer() as discord, TelegramServer() as telegram:
        redis = {"GUPPY_REDIS_URL": redis_server.url}
        processes = [
            start("worker", **redis),
            start("discord", **redis, **discord.environment),
            start("telegram", **redis, GUPPY_TELEGRAM_TOKEN=telegram.token, GUPPY_TELEGRAM_API_BASE=telegram.base),
        ]
        await awake(redis_server)
        await discord.connected(within=60)

        ann = telegram.person("ann")
        chat = telegram.private(ann)
        await telegram.say(chat, "are you hungry", by=ann)
        on_discord = await discord.reply_to(await discord.say("are you hungry"), within=30)
        on_telegram = (await telegram.heard(chat, within=30))[0]["text"]
        for reply in (on_discord, on_telegram):
            assert sounds_like_guppy(reply), reply
        long = await discord.reply_to(await discord.say("are you hungry " * 100), within=30)
        assert long.split("\n-# ")[1] in voice.variants("prompt_cut"), "it was too long for a fish's head"
        assert not telegram.violations

        for process in processes:
            process.process.terminate()
        for process in processes:
            assert await asyncio.to_thread(process.exit_code, 10) == 0, process.log.read_text()
    with redis_server.client() as client:
        kept = b"".join(client.dump(key) or b"" for key in client.scan_iter())
    assert b"hungry" not in kept
    assert not any("hungry" in process.log.read_text() for process in processes)


async def test_one_process_and_one_token_are_a_complete_bot(start: Start) -> None:
    """`python -m bot all` without Redis: the fish lives in the same process."""
    async with TelegramServer() as telegram:
        process = start("all", GUPPY_TELEGRAM_TOKEN=telegram.token, GUPPY_TELEGRAM_API_BASE=telegram.base)
        bob = telegram.person("bob")
        chat = telegram.private(bob)
        await telegram.say(chat, "are you hungry", by=bob)
        assert sounds_like_guppy((await telegram.heard(chat, within=60))[0]["text"])
        process.process.terminate()
        assert await asyncio.to_thread(process.exit_code, 10) == 0
