"""`python -m bot all | discord | telegram | worker | health ROLE | invite`: the processes of the service.

`all` runs every adapter that has a token, with the fish in the same process, or at the far end of the queue when
GUPPY_REDIS_URL is set. The other roles are for one process (one container) each and need Redis.

An adapter is a module with `async def serve(settings: Settings, fish: Fish, stop: asyncio.Event) -> None`: it connects,
beats its `health.pulse`, and when `stop` is set takes no more questions, answers those it has, and returns (within 8
seconds). It raises `Refusal` when a person must change something. The fish is ready when `serve` is called.
"""

import argparse
import asyncio
import importlib
import os
import resource
import signal
import sys
from contextlib import AsyncExitStack
from types import ModuleType

from bot import health, logs, metrics, worker
from bot.fish import Fish
from bot.lifetime import Stopped, unless_stopped, until_finished
from bot.local import LocalFish
from bot.local import load as load_engine
from bot.queue import QueuedFish
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings, load

PLATFORMS = {
    "discord": "It is on the Bot page of your application at https://discord.com/developers/applications.",
    "telegram": "@BotFather gives it to you in Telegram (/newbot, or /token for a bot that you have).",
}
"""Each adapter's module, and where its token comes from."""

log = logs.get("main")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bot", description="The service around Guppy.")
    roles = parser.add_subparsers(dest="role", required=True, metavar="ROLE")
    roles.add_parser("all", help="every adapter with a token; the fish in this process, or behind GUPPY_REDIS_URL")
    for platform in PLATFORMS:
        roles.add_parser(platform, help=f"the {platform.title()} adapter; the fish behind GUPPY_REDIS_URL")
    roles.add_parser("worker", help="a fish behind GUPPY_REDIS_URL")
    check = roles.add_parser("health", help="exit 0 if ROLE works in this container; else say what is wrong and exit 1")
    check.add_argument("of", metavar="ROLE", choices=["all", *PLATFORMS, "worker"])
    roles.add_parser("invite", help="print the links by which people add the Discord bot of the token")
    arguments = parser.parse_args()
    try:
        settings = load()
        if arguments.role == "health":
            return _health(settings, arguments.of)
        logs.configure(settings, arguments.role)
        if arguments.role == "invite":
            sys.stdout.write(asyncio.run(_invite(settings)) + "\n")
            return 0
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold what people typed
        asyncio.run(_run(settings, arguments.role))
    except Stopped:
        return 0
    except Refusal as refusal:
        sys.stderr.write(f"guppy: {refusal.sentence}\n")
        if refusal.exit_code is ExitCode.STUCK:
            sys.stderr.flush()
            os._exit(refusal.exit_code)  # a normal exit would wait for the thread that hangs
        return refusal.exit_code
    return 0


def _health(settings: Settings, role: str) -> int:
    parts = [*_with_token(settings), *([] if settings.redis_url else ["fish"])] if role == "all" else [role]
    wrong = [sentence for part in parts if (sentence := health.check(part))]
    sys.stdout.write((" ".join(wrong) or "ok") + "\n")
    return 1 if wrong else 0


async def _invite(settings: Settings) -> str:
    _check_token(settings, "discord")
    links: str = await _adapter("discord").invite(settings)
    return links


def _check_token(settings: Settings, platform: str) -> None:
    if platform not in _with_token(settings):
        raise Refusal(f"GUPPY_{platform.upper()}_TOKEN is not set. {PLATFORMS[platform]}", ExitCode.SETTINGS)


def _with_token(settings: Settings) -> list[str]:
    return [platform for platform in PLATFORMS if getattr(settings, f"{platform}_token") is not None]


async def _run(settings: Settings, role: str) -> None:
    loop = asyncio.get_running_loop()
    logs.loop_errors(loop)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    platforms = _with_token(settings) if role == "all" else [role] if role in PLATFORMS else []
    if role == "all" and not platforms:
        raise Refusal("No token is set: set GUPPY_DISCORD_TOKEN, GUPPY_TELEGRAM_TOKEN or both.", ExitCode.SETTINGS)
    if role in PLATFORMS:
        _check_token(settings, role)
    if role != "all" and settings.redis_url is None:
        raise Refusal(
            f"The role {role} needs GUPPY_REDIS_URL, like redis://localhost:6379/0; `python -m bot all` does without.",
            ExitCode.SETTINGS,
        )
    metrics.serve(settings)
    if role == "worker":
        await until_finished(stop, worker.serve(settings, stop))
    else:
        await until_finished(stop, _adapters(settings, [_adapter(platform) for platform in platforms], stop))
    log.info("stopped")


def _adapter(platform: str) -> ModuleType:
    try:
        return importlib.import_module(f"bot.{platform}")
    except ModuleNotFoundError as missing:
        raise Refusal(
            f"The {platform} adapter needs {missing.name}, which is not installed here: "
            f"pip install 'guppylm[{platform}]'.",
            ExitCode.SETTINGS,
        ) from None


async def _adapters(settings: Settings, adapters: list[ModuleType], stop: asyncio.Event) -> None:
    async with AsyncExitStack() as stack:
        fish = await unless_stopped(stop, _fish(settings, stack))
        running = [asyncio.create_task(adapter.serve(settings, fish, stop)) for adapter in adapters]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.set()  # one that cannot go on ends all: half a service would look like a whole one
            await asyncio.wait(running)  # but each may finish, whatever the first one has to say
            await asyncio.gather(*running)


async def _fish(settings: Settings, stack: AsyncExitStack) -> Fish:
    """The fish that the settings name, ready; `stack` closes it."""
    if settings.redis_url is not None:
        return await stack.enter_async_context(QueuedFish(settings))
    engine = await load_engine(settings)
    stack.push_async_callback(engine.aclose)
    fish = LocalFish(engine, settings)
    await stack.enter_async_context(health.pulse("fish", lambda: fish.progress.stalled() < health.STALLED))
    return fish


if __name__ == "__main__":
    sys.exit(main())
