"""What is logged, and what never is, whatever the level and whoever logs it: `bot/logs.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CANARY = "my-secret-thought"
SETTINGS = {
    "GUPPY_LOG_LEVEL": "DEBUG",
    "GUPPY_TELEGRAM_TOKEN": "123456:telegram-token",
    "GUPPY_REDIS_URL": "redis://:redis%2Fpassword@localhost",
}


def logged(script: str, form: str = "json") -> str:
    """What a process logs that runs `script` with logs configured."""
    begin = (
        "import asyncio, logging, threading\nfrom bot import logs, settings\n"
        "logs.configure(settings.load(), 'worker')\nlog = logs.get('test')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", begin + script],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, "GUPPY_LOG_FORMAT": form},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout == ""
    return process.stderr


def lines(script: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged(script).splitlines()]


def test_a_line_is_an_event_with_its_numbers() -> None:
    [line] = lines("log.info('answered', id='abc', seconds=0.25)")
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "role": "worker",
        "logger": "guppy.test",
        "level": "info",
        "event": "answered",
        "id": "abc",
        "seconds": 0.25,
    }


def test_on_a_console_it_is_for_people() -> None:
    assert "answered" in logged("log.info('answered')", "console")


def test_our_own_debug_lines_are_heard_and_those_of_libraries_are_not() -> None:
    [line] = lines(
        f"for name in ('discord.gateway', 'telegram.ext.ExtBot', 'asyncio', 'websockets', 'aiohttp.client'):\n"
        f"    logging.getLogger(name).debug('received {CANARY}')\n"
        f"logging.getLogger('httpx').info('HTTP Request: POST https://api.telegram.org/bot123:token/sendMessage')\n"
        f"log.debug('ours')"
    )
    assert line["event"] == "ours"


@pytest.mark.parametrize(
    "script",
    [
        "try: raise ValueError(CANARY)\nexcept ValueError as e: log.error('failed', exc_info=e)",
        "try: raise ValueError(CANARY)\nexcept ValueError: log.exception('failed')",
        "try: raise ValueError(CANARY)\nexcept ValueError: logging.getLogger('discord').exception('failed')",
        "try:\n  try: raise ValueError(CANARY)\n  except ValueError as e: raise KeyError(CANARY) from e\n"
        "except KeyError: logging.getLogger('telegram.ext').error('failed', exc_info=True)",
        "raise ValueError(CANARY)",
        "def work(): raise ValueError(CANARY)\nt = threading.Thread(target=work); t.start(); t.join()",
        "class A:\n  def __del__(self): raise ValueError(CANARY)\nA()",
        "async def main():\n  logs.loop_errors(asyncio.get_running_loop())\n"
        "  async def work(): raise ValueError(CANARY)\n"
        "  task = asyncio.create_task(work()); await asyncio.sleep(0.01); del task\n"
        "  import gc; gc.collect(); await asyncio.sleep(0)\nasyncio.run(main())",
    ],
    ids=["bound", "exception", "library", "chained", "uncaught", "thread", "destructor", "task"],
)
@pytest.mark.parametrize("form", ["json", "console"])
def test_of_an_error_only_its_type_and_place_are_logged(script: str, form: str) -> None:
    output = logged(f"CANARY = {CANARY!r}\n" + script, form)
    assert CANARY not in output
    assert "ValueError" in output
    assert "<string>:" in output
    assert len(output.splitlines()) == 1


def test_no_secret_of_the_settings_is_logged_by_anybody() -> None:
    output = logged(
        "log.warning('https://api.telegram.org/bot123456:telegram-token/getMe')\n"
        "logging.getLogger('telegram').error('using 123456:telegram-token')\n"
        "logging.getLogger('redis').error('%s or %s', 'redis://:redis%2Fpassword@localhost', 'redis/password')"
    )
    assert output.count("[secret]") >= 4
    assert "telegram-token" not in output
    assert "password" not in output


def test_an_update_that_the_telegram_library_could_not_read_is_not_written_out() -> None:
    output = logged(
        f"logging.getLogger('telegram.ext.ExtBot').critical('Received data was %s', {{'text': {CANARY!r}}})"
    )
    assert "Received data was %s" in output
    assert CANARY not in output


def test_a_line_that_cannot_be_written_is_reported_without_its_arguments() -> None:
    output = logged(f"logging.getLogger('discord').error('%d', {CANARY!r})")
    assert "could not be written" in output
    assert CANARY not in output
