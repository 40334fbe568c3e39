"""`run-role.sh`: what a container does when its role ends."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from bot.refusal import ExitCode

SCRIPT = Path(__file__).parents[2] / "docker/run-role.sh"


def start(folder: Path, python: str, sleep: str = 'echo "$1" >slept') -> "subprocess.Popen[str]":
    """The script, with these two in the place of `python` and `sleep`."""
    for name, body in (("python", python), ("sleep", sleep)):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.Popen(
        [SCRIPT, "discord"], cwd=folder, env={**os.environ, "PATH": path}, stderr=subprocess.PIPE, text=True
    )


def wait_for(file: Path) -> None:
    until = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_runs_the_role(tmp_path: Path) -> None:
    assert start(tmp_path, 'echo "$@" >ran').wait(10) == 0
    assert (tmp_path / "ran").read_text() == "-m bot discord\n"
    assert not (tmp_path / "slept").exists()


@pytest.mark.parametrize("code", [ExitCode.MODEL, ExitCode.REDIS, ExitCode.TOKEN, ExitCode.SETTINGS])
def test_a_refusal_is_not_repeated_at_once(tmp_path: Path, code: ExitCode) -> None:
    process = start(tmp_path, f"exit {code.value}")
    assert process.wait(10) == code
    pause = int((tmp_path / "slept").read_text())
    assert 86_400 / pause < 1000, "Discord takes a token away after so many connections in a day"
    assert process.stderr is not None
    assert f"{pause} seconds" in process.stderr.read()


@pytest.mark.parametrize("code", [ExitCode.STUCK.value, 1, 137])
def test_any_other_end_is_followed_by_a_fresh_start(tmp_path: Path, code: int) -> None:
    assert start(tmp_path, f"exit {code}").wait(10) == code
    assert not (tmp_path / "slept").exists()


def test_a_signal_lets_the_role_finish(tmp_path: Path) -> None:
    process = start(tmp_path, "trap 'sleep=1; touch finished; exit 0' TERM; touch ready; while :; do :; done")
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert (tmp_path / "finished").exists()


def test_a_signal_ends_the_pause(tmp_path: Path) -> None:
    process = start(tmp_path, "exit 77", sleep="touch sleeping; exec /bin/sleep 60")
    wait_for(tmp_path / "sleeping")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == ExitCode.TOKEN
