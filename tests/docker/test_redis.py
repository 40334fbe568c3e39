"""The queue's Redis, started by the very script and configuration of its image."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from bot.limits import Verdict, limiter
from bot.queue import QueuedFish
from bot.refusal import Refusal
from bot.settings import Settings
from tests.standins.processes import working
from tests.standins.redis_server import executable, free_port

FOLDER = Path(__file__).parents[2] / "docker/redis"


class Container:
    """What runs in the container, with a folder in the place of /run/secrets."""

    def __init__(self, secrets: Path) -> None:
        self.secrets = secrets
        self.port = free_port()
        path = f"{Path(executable()).parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "SECRETS": str(secrets), "TMPDIR": str(secrets.parent)}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [FOLDER / "start.sh", "--port", str(self.port), "--dir", str(self.secrets.parent)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
        )
        until = time.monotonic() + 15
        while not self.healthy():
            assert time.monotonic() < until, "Redis is not healthy in time"
            assert self.process.poll() is None, "Redis has ended"

    def healthy(self) -> bool:
        check = subprocess.run(
            [FOLDER / "health.sh", "-p", str(self.port)], env=self.environment, capture_output=True, check=False
        )
        return check.returncode == 0

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def password(self) -> str:
        return (self.secrets / "guppy_redis_password").read_text()

    def settings(self) -> Settings:
        url = f"redis://guppy@127.0.0.1:{self.port}/0"
        return Settings.model_validate({"redis_url": url, "redis_password": self.password, "deadline": 10})

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, username="guppy", password=self.password)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    (tmp_path / "secrets").mkdir()
    container = Container(tmp_path / "secrets")
    container.start()
    yield container
    container.kill()


async def test_guppy_may_do_all_that_he_does(container: Container) -> None:
    settings = container.settings()
    async with working(settings), QueuedFish(settings) as fish:
        assert (await fish.ask("are you hungry")).text == "blub. are you hungry"
    limits = limiter(settings, "discord")
    async with limits.turn("a person", "a message") as turn:
        assert turn.verdict is Verdict.WELCOME
        assert await turn.may_notice()
    await limits.aclose()
    with container.client() as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.acl_log()  # what he was refused would stand there; he can't even look


@pytest.mark.parametrize(
    "command",
    ["GET another:key", "KEYS *", "CONFIG GET save", "FLUSHALL", "MONITOR", "DEBUG SLEEP 0", "SAVE", "ACL LIST",
     "SLOWLOG GET", "CLIENT LIST", "SCRIPT FLUSH", "SUBSCRIBE c"],
)  # fmt: skip
def test_guppys_user_may_do_nothing_else(container: Container, command: str) -> None:
    with container.client() as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())


def test_a_script_reaches_no_other_key(container: Container) -> None:
    with container.client() as client, pytest.raises(redis.exceptions.ResponseError):
        client.eval("return redis.call('GET', 'another:key')", 0)


def test_nobody_else_gets_in(container: Container) -> None:
    for options in ({}, {"password": container.password}, {"username": "guppy", "password": "wrong"}):
        client = redis.Redis(port=container.port, retry=Retry(NoBackoff(), 0), **options)  # type: ignore[arg-type]
        with pytest.raises((redis.exceptions.AuthenticationError, redis.exceptions.ResponseError)):
            client.ping()


async def test_a_wrong_password_is_told_as_such(container: Container) -> None:
    settings = container.settings().model_copy(update={"redis_password": None})
    with pytest.raises(Refusal, match="GUPPY_REDIS_PASSWORD"):
        async with QueuedFish(settings):
            pass


def test_the_password_makes_itself_and_outlives_redis(container: Container) -> None:
    password = container.password
    assert len(password) == 64
    container.kill()
    assert not container.healthy()
    container.start()
    assert container.password == password
    assert b"\0" + password.encode() not in Path(f"/proc/{container.process.pid}/cmdline").read_bytes()  # type: ignore[union-attr]


def test_a_password_of_ones_own_is_taken(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/guppy_redis_password").write_text("bubbles\n")  # as `openssl rand` writes it
    container = Container(tmp_path / "secrets")
    container.start()
    try:
        assert redis.Redis(port=container.port, username="guppy", password="bubbles").ping()
    finally:
        container.kill()


async def test_nothing_is_written_to_disk(container: Container) -> None:
    settings = container.settings()
    async with working(settings), QueuedFish(settings) as fish:
        await fish.ask("yellow-canary")
    assert container.process is not None
    container.process.terminate()  # in good order, as `docker compose down` does
    container.process.wait()
    files = [path for path in container.secrets.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".rdb", ".aof") or b"yellow-canary" in path.read_bytes()]
    container.start()
