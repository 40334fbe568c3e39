"""Discord and Telegram for containers: the stand-ins in one process that other containers reach, and people who ask.

    python -m tests.docker.platforms serve
    python -m tests.docker.platforms ask discord --people 20 --text "are you hungry"

`serve` listens on DISCORD and TELEGRAM (other containers) and CONTROL (this one). `ask` tells it to let so many people
say something at once, prints "said" when they have, waits for what each of them hears, and prints one line of JSON: how
many asked, how many got a reply of the fish, how many got a line instead (asleep, busy...), how many got nothing, and
how many got more than one message; with an example of a reply and of a line.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tomllib
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files

from aiohttp import web

from tests.standins import discord, telegram
from tests.standins.processes import until

DISCORD, TELEGRAM, CONTROL = 8001, 8002, 8003
PATIENCE = 30.0
"""Seconds for which a person waits for a first message."""

LINES: dict[str, str | list[str]] = tomllib.loads((files("bot") / "messages" / "en.toml").read_text("utf-8"))

_people = itertools.count(600_000_000_000_000_000)
_names = itertools.count()
Ask = Callable[[str], Awaitable[Callable[[], list[str]]]]
"""Lets a new person say something; the result tells what they have heard so far."""


def _is_a_line(text: str) -> bool:
    """Whether this is a fixed text, not a reply of the fish."""
    return any(text in ([line] if isinstance(line, str) else line) for line in LINES.values())


async def _forward(port: int, to: int) -> None:
    """Let other containers in: the stand-ins listen on the loopback only."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))

    await asyncio.start_server(accept, "0.0.0.0", port)


async def _hear(heard: Callable[[], list[str]]) -> list[str]:
    with suppress(AssertionError):
        await until(lambda: bool(heard()), PATIENCE)
    await asyncio.sleep(1.0)  # for a second message, which must not come
    return heard()


async def serve() -> None:
    async with discord.DiscordServer() as discord_server, telegram.TelegramServer() as telegram_server:
        await _forward(DISCORD, discord_server.port)
        await _forward(TELEGRAM, telegram_server.port)

        async def ask_on_discord(text: str) -> Callable[[], list[str]]:
            id = next(_people)
            # A chat of its own: in one channel Guppy says only so much in a minute.
            author = discord.person(id, f"person{id}")
            message = await discord_server.say(text, direct=True, author=author, channel_id=str(id + 1_000_000))
            return lambda: discord_server.replies(message)

        async def ask_on_telegram(text: str) -> Callable[[], list[str]]:
            person = telegram_server.person(f"Person {next(_names)}")
            chat = telegram_server.private(person)
            await telegram_server.say(chat, text, by=person)
            return lambda: [message["text"] for message in telegram_server.said_in(chat)]

        asks = {"discord": ask_on_discord, "telegram": ask_on_telegram}

        async def control(request: web.Request) -> web.StreamResponse:
            order = await request.json()
            answer = web.StreamResponse()
            await answer.prepare(request)
            asked = [await asks[order["platform"]](order["text"]) for _ in range(order["people"])]
            await answer.write(b"said\n")
            heard = await asyncio.gather(*map(_hear, asked))
            lines = [texts for texts in heard if texts and _is_a_line(texts[0])]
            replies = [texts for texts in heard if texts and texts not in lines]
            counts = {
                "asked": len(heard),
                "answered": len(replies),
                "lines": len(lines),
                "silent": sum(not texts for texts in heard),
                "doubled": sum(len(texts) > 1 for texts in heard),
                "reply": replies[0][0] if replies else None,
                "line": lines[0][0] if lines else None,
            }
            await answer.write(json.dumps(counts).encode() + b"\n")
            return answer

        app = web.Application()
        app.add_routes([web.post("/ask", control)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", CONTROL).start()
        sys.stdout.write("ready\n")
        await asyncio.Event().wait()


def ask(platform: str, people: int, text: str) -> None:
    order = json.dumps({"platform": platform, "people": people, "text": text}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{CONTROL}/ask", order, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE + 30) as response:
        for line in response:
            sys.stdout.write(line.decode())
            sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("serve")
    asking = roles.add_parser("ask")
    asking.add_argument("platform", choices=["discord", "telegram"])
    asking.add_argument("--people", type=int, default=1)
    asking.add_argument("--text", default="are you hungry")
    arguments = parser.parse_args()
    if arguments.role == "serve":
        asyncio.run(serve())
    else:
        ask(arguments.platform, arguments.people, arguments.text)
