"""Health tells progress: `bot/health.py` and `python -m bot health ROLE`."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from bot import health

ROOT = Path(__file__).parents[2]


def command(role: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "bot", "health", role],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


async def test_a_role_is_well_while_it_makes_progress_and_only_then(tmp_path: Path) -> None:
    assert health.check("worker") is not None
    async with health.pulse("worker", lambda: True):
        await asyncio.sleep(0.05)
        assert health.check("worker") is None
        done = await asyncio.to_thread(command, "worker", TMPDIR=str(tmp_path))
        assert (done.returncode, done.stdout) == (0, "ok\n")
        assert health.check("discord") is not None, "each role speaks for itself"
    assert health.check("worker") is not None


async def test_a_role_without_progress_is_not_well(tmp_path: Path) -> None:
    async with health.pulse("worker", lambda: False):
        await asyncio.sleep(0.05)
        done = await asyncio.to_thread(command, "worker", TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "worker is not ready" in done.stdout


async def test_a_pulse_that_stopped_is_told_by_its_age(tmp_path: Path) -> None:
    async with health.pulse("worker", lambda: True):
        await asyncio.sleep(0.05)
        pulse = tmp_path / "guppy-worker.pulse"
        os.utime(pulse, (time.time() - 60,) * 2)
        assert "no progress for 60 seconds" in (health.check("worker") or "")


async def test_a_loop_that_is_blocked_gives_no_pulse(tmp_path: Path) -> None:
    def blocked() -> float:
        time.sleep(1.3)
        return (tmp_path / "guppy-worker.pulse").stat().st_mtime

    async with health.pulse("worker", lambda: True):
        await asyncio.sleep(0.05)
        assert blocked() < time.time() - 1.2


async def test_the_pulse_of_a_former_life_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "guppy-worker.pulse").touch()
    async with health.pulse("worker", lambda: False):
        await asyncio.sleep(0.05)
        assert health.check("worker") is not None


def test_health_of_all_asks_for_what_all_runs(tmp_path: Path) -> None:
    (tmp_path / "guppy-telegram.pulse").touch()
    (tmp_path / "guppy-fish.pulse").touch()
    assert command("all", TMPDIR=str(tmp_path), GUPPY_TELEGRAM_TOKEN="1:t").returncode == 0
    both = command("all", TMPDIR=str(tmp_path), GUPPY_TELEGRAM_TOKEN="1:t", GUPPY_DISCORD_TOKEN="t")
    assert both.returncode == 1
    assert "discord" in both.stdout
    (tmp_path / "guppy-fish.pulse").unlink()
    assert command("all", TMPDIR=str(tmp_path), GUPPY_TELEGRAM_TOKEN="1:t").returncode == 1
    behind = {"GUPPY_REDIS_URL": "redis://localhost"}
    assert command("all", TMPDIR=str(tmp_path), GUPPY_TELEGRAM_TOKEN="1:t", **behind).returncode == 0


def test_an_engine_with_work_and_without_steps_stalls() -> None:
    steps, busy = 0, False
    progress = health.Progress(lambda: steps, lambda: busy)
    time.sleep(0.05)
    assert progress.stalled() < 0.05, "nothing to do is no standstill"
    busy = True
    time.sleep(0.05)
    assert progress.stalled() >= 0.05
    steps += 1
    assert progress.stalled() < 0.05
