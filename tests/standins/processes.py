"""Processes of the service for tests, and waiting for what they do."""

import asyncio
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from bot import worker
from bot.local import Engine
from bot.queue import GROUP, REQUESTS, WORKERS
from bot.settings import Settings
from tests.standins.engine import StandInEngine
from tests.standins.redis_server import RedisServer

ROOT = Path(__file__).parents[2]


class Process:
    """A process of the service with its settings in its environment; what it logs goes to `log`."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(folder), "GUPPY_LOG_FORMAT": "json", **environment},
            )

    def exit_code(self, within: float = 45) -> int:
        return self.process.wait(timeout=within)

    async def logs(self, text: str, within: float = 45) -> None:
        """Wait until it has logged `text`."""
        await until(lambda: text in self.log.read_text(), within)


@asynccontextmanager
async def working(settings: Settings, engine: Engine | None = None) -> AsyncIterator[Engine]:
    """A worker in this process."""
    engine = engine or StandInEngine()
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(settings, engine, stop))
    try:
        yield engine
    finally:
        stop.set()
        await task
        await engine.aclose()


async def until(condition: Callable[[], bool], within: float = 45) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def awake(server: RedisServer, workers: int = 1) -> None:
    """Wait until so many workers have shown themselves."""
    with server.client() as client:
        await until(lambda: client.zcard(WORKERS) == workers)


async def in_hand(server: RedisServer, questions: int) -> None:
    """Wait until workers have so many questions in work."""
    with server.client() as client:
        await until(lambda: bool(client.exists(REQUESTS)) and client.xpending(REQUESTS, GROUP)["pending"] == questions)


def scrape(port: int) -> str:
    """The metrics that a process serves on `port`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text: str = response.read().decode()
        return text


def megabytes(pid: int) -> float:
    """The resident memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
