"""Processes of the service for tests: workers without a model, on a real Redis."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bot import worker
from bot.queue import WORKERS
from bot.settings import Settings
from tests.standins.engine import StandInEngine
from tests.standins.redis_server import RedisServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulses of this test's processes, not of the next one's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def settings(redis_server: RedisServer) -> Settings:
    return Settings.model_validate({"redis_url": redis_server.url, "deadline": 10})


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

    def exit_code(self, within: float = 15) -> int:
        return self.process.wait(timeout=within)

    async def logs(self, text: str, within: float = 15) -> None:
        """Wait until it has logged `text`."""
        await until(lambda: text in self.log.read_text(), within)


StartWorker = Callable[..., Process]


@pytest.fixture
def start_worker(redis_server: RedisServer, tmp_path: Path) -> Iterator[StartWorker]:
    """Start worker processes: `start_worker(step_ms=5, tokens=10, GUPPY_MAX_BATCH="4")`."""
    started: list[Process] = []

    def start(step_ms: float = 1, tokens: int = 8, **environment: str) -> Process:
        process = Process(
            ["-m", "tests.standins.engine", "--step-ms", str(step_ms), "--tokens", str(tokens)],
            tmp_path / f"worker{len(started)}",
            {"GUPPY_REDIS_URL": redis_server.url, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()


@asynccontextmanager
async def working(settings: Settings, engine: StandInEngine | None = None) -> AsyncIterator[StandInEngine]:
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


async def until(condition: Callable[[], bool], within: float = 15) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def awake(server: RedisServer, workers: int = 1) -> None:
    """Wait until so many workers have shown themselves."""
    with server.client() as client:
        await until(lambda: client.zcard(WORKERS) == workers)
