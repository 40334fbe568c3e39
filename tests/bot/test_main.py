"""The processes as they are started, `python -m bot ROLE`: each refuses with one sentence and a code of its own."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bot.__main__ as main
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings
from tests.standins.processes import Process, until
from tests.standins.redis_server import RedisServer, free_port

ROOT = Path(__file__).parents[2]


def start(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GUPPY_")}
    return subprocess.run(
        [sys.executable, "-m", "bot", *arguments],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def refused(process: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    """One sentence for people, and no trace of Python."""
    last = process.stderr.splitlines()[-1]
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    assert last.startswith("guppy: ")
    for word in words:
        assert word in last


def test_all_without_a_token_says_which_to_set() -> None:
    refused(start("all"), ExitCode.SETTINGS, "GUPPY_DISCORD_TOKEN", "GUPPY_TELEGRAM_TOKEN")


@pytest.mark.parametrize(("role", "where"), [("discord", "discord.com/developers"), ("telegram", "@BotFather")])
def test_an_adapter_without_its_token_says_where_it_comes_from(role: str, where: str) -> None:
    refused(start(role), ExitCode.SETTINGS, f"GUPPY_{role.upper()}_TOKEN", where)


@pytest.mark.parametrize("role", ["discord", "telegram", "worker"])
def test_a_role_of_its_own_needs_redis(role: str) -> None:
    tokens = {"GUPPY_DISCORD_TOKEN": "t", "GUPPY_TELEGRAM_TOKEN": "1:t"}
    refused(start(role, **tokens), ExitCode.SETTINGS, "GUPPY_REDIS_URL", role)


def test_an_unknown_setting_is_refused() -> None:
    refused(start("all", GUPPY_DISCORD_TOKEN="t", GUPPY_TYPO="1"), ExitCode.SETTINGS, "GUPPY_TYPO")


def test_an_unknown_role_is_refused() -> None:
    process = start("discrod")
    assert process.returncode == 2
    assert "discrod" in process.stderr


def test_a_missing_model_is_refused_by_name(tmp_path: Path) -> None:
    model = str(tmp_path / "no-such-fish")
    url = f"redis://127.0.0.1:{free_port()}"
    refused(start("worker", GUPPY_MODEL=model, GUPPY_REDIS_URL=url), ExitCode.MODEL, "no-such-fish")


def test_a_wrong_redis_password_is_refused_before_any_platform_is_called(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "bubbles").start()
    try:
        process = start(
            "discord", GUPPY_DISCORD_TOKEN="t", GUPPY_REDIS_URL=server.url, GUPPY_REDIS_PASSWORD="wrong-one"
        )
        refused(process, ExitCode.REDIS, "GUPPY_REDIS_PASSWORD")
        assert "wrong-one" not in process.stderr
    finally:
        server.kill()


async def test_no_platform_is_called_before_redis_answers(tmp_path: Path) -> None:
    """Connecting first and failing then, in a restart loop, is how bots lose their token."""
    calls = 0

    async def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.close()

    platform = await asyncio.start_server(called, "127.0.0.1", 0)
    here = f"http://127.0.0.1:{platform.sockets[0].getsockname()[1]}"
    redis = RedisServer(tmp_path)
    settings = {
        "GUPPY_REDIS_URL": redis.url,
        "GUPPY_DISCORD_TOKEN": "a.discord.token",
        "GUPPY_TELEGRAM_TOKEN": "1:t",
        "GUPPY_DISCORD_API_BASE": here,
        "GUPPY_TELEGRAM_API_BASE": f"{here}/bot",
    }
    service = Process(["-m", "bot", "all"], tmp_path / "all", settings)
    try:
        await service.logs("redis is away")
        await asyncio.sleep(2)
        assert service.process.poll() is None
        assert calls == 0
        redis.start()
        await until(lambda: calls > 0)
    finally:
        service.process.kill()
        service.process.wait()
        redis.kill()
        platform.close()


def test_importing_the_service_imports_neither_torch_nor_a_platform() -> None:
    script = "import sys, bot.__main__; print({'torch', 'discord', 'telegram', 'guppylm'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


def test_every_code_of_refusal_is_its_own() -> None:
    codes = [code.value for code in ExitCode]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2} & set(codes)


async def test_when_one_adapter_cannot_go_on_the_other_one_still_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    finished = []

    async def refuse(*_: object) -> None:
        raise Refusal("Telegram refuses.", ExitCode.TOKEN)

    async def finish(_: object, __: object, stop: asyncio.Event) -> None:
        await stop.wait()
        await asyncio.sleep(0.2)
        finished.append(True)

    async def no_fish(*_: object) -> None:
        pass

    monkeypatch.setattr(main, "_fish", no_fish)
    adapters: list[Any] = [SimpleNamespace(serve=refuse), SimpleNamespace(serve=finish)]
    with pytest.raises(Refusal):
        await main._adapters(Settings(), adapters, asyncio.Event())
    assert finished
