"""Workers without a model, on a real Redis."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bot import queue
from bot.settings import Settings
from tests.standins.engine import hasty
from tests.standins.processes import Process
from tests.standins.redis_server import RedisServer


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulses of this test's processes, not of the next one's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(autouse=True)
def short_waits_inside_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a worker in this process stops ten times sooner."""
    monkeypatch.setattr(queue, "BLOCK", 100)


@pytest.fixture
def settings(redis_server: RedisServer) -> Settings:
    return Settings.model_validate({"redis_url": redis_server.url, "deadline": 40})


@pytest.fixture
def hasty_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in this process sees four times sooner that something stands still."""
    for module, name, value in hasty(4):
        monkeypatch.setattr(module, name, value)


StartWorker = Callable[..., Process]


@pytest.fixture
def start_worker(redis_server: RedisServer, tmp_path: Path) -> Iterator[StartWorker]:
    """Start worker processes: `start_worker(step_ms=5, tokens=10, hasty=3, GUPPY_MAX_BATCH="4")`."""
    started: list[Process] = []

    def start(step_ms: float = 1, tokens: int = 8, hasty: float = 1, **environment: str) -> Process:
        engine = ["--step-ms", str(step_ms), "--tokens", str(tokens), "--hasty", str(hasty)]
        process = Process(
            ["-m", "tests.standins.engine", *engine],
            tmp_path / f"worker{len(started)}",
            {"GUPPY_REDIS_URL": redis_server.url, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.process.kill()
        process.process.wait()
