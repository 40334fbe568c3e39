"""`bot/link.py` against a real Redis: whatever goes wrong becomes one of three errors, and none of them quotes."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bot.link import Away, Denied, Full, Link, Script
from bot.queue import QueuedFish
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings
from tests.standins.processes import working
from tests.standins.redis_server import RedisServer, free_port

WRITE = Script("return redis.call('SET', KEYS[1], ARGV[1])")


def at(url: str, **more: Any) -> Settings:
    return Settings.model_validate({"redis_url": url, **more})


@asynccontextmanager
async def linked(settings: Settings) -> AsyncIterator[Link]:
    link = Link(settings)
    try:
        yield link
    finally:
        await link.aclose()


async def test_a_thousand_commands_at_once_share_one_connection(settings: Settings, redis_server: RedisServer) -> None:
    client = redis_server.client()
    async with linked(settings) as link:
        answers = await asyncio.gather(*(link.call("ECHO", n) for n in range(1000)))
        others = [c for c in client.client_list() if c["cmd"] != "client|list" and c["cmd"] != "client"]
    assert answers == [str(n).encode() for n in range(1000)]
    assert len(others) == 1


async def test_a_command_that_nobody_waits_for_any_more_does_not_disturb_the_others(settings: Settings) -> None:
    async with linked(settings) as link:
        calls = [asyncio.create_task(link.call("ECHO", n)) for n in range(20)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        assert await asyncio.gather(*calls[1::2]) == [str(n).encode() for n in range(1, 20, 2)]
        assert await link.call("ECHO", "after") == b"after"


async def test_a_connection_that_was_cut_while_idle_is_no_outage(settings: Settings, redis_server: RedisServer) -> None:
    async with linked(settings) as link:
        await link.call("PING")
        redis_server.client().client_kill_filter(_type="normal", skipme=True)
        assert await link.call("ECHO", "still here") == b"still here"


async def test_a_script_that_redis_forgot_is_sent_again(settings: Settings, redis_server: RedisServer) -> None:
    async with linked(settings) as link:
        assert await link.run(WRITE, ["key"], "value") == b"OK"
        redis_server.client().script_flush()
        assert await asyncio.gather(*(link.run(WRITE, ["key"], n) for n in range(5))) == [b"OK"] * 5


async def test_the_password_may_stand_apart_from_the_address(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "bubbles").start()
    try:
        for settings in (
            at(server.url, redis_password="bubbles"),
            at(server.url.replace("//", "//:bubbles@")),
            at(server.url.replace("//", "//default@"), redis_password="bubbles"),
        ):
            async with linked(settings) as link:
                assert await link.call("PING") == b"PONG"
        for settings in (at(server.url), at(server.url, redis_password="wrong-one")):
            async with linked(settings) as link:
                with pytest.raises(Refusal) as refused:
                    await asyncio.wait_for(link.ready(), 5)
                assert refused.value.exit_code is ExitCode.REDIS
                assert "GUPPY_REDIS_PASSWORD" in refused.value.sentence
                assert "wrong-one" not in refused.value.sentence
    finally:
        server.kill()


async def test_a_user_without_permission_is_refused_with_a_sentence(
    settings: Settings, redis_server: RedisServer
) -> None:
    client = redis_server.client()
    client.acl_setuser("fish", enabled=True, passwords=["+pw"], commands=["+ping"], keys=["{guppy}:*"])
    async with linked(at(redis_server.url.replace("//", "//fish:pw@"))) as link:
        await link.ready()
        with pytest.raises(Denied, match="NOPERM"):
            await link.run(WRITE, ["key"], "value")


CERTIFICATE = Path(__file__).with_name("localhost.pem")


@asynccontextmanager
async def tls_in_front_of(server: RedisServer) -> AsyncIterator[int]:
    """A port that speaks TLS and passes on to Redis, as a managed Redis's proxy does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pipe(reader, behind[1]), pipe(behind[0], writer), return_exceptions=True)

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        proxy.close()


async def test_tls_with_a_certificate_that_is_trusted(redis_server: RedisServer) -> None:
    trusted = f"?ssl_ca_certs={CERTIFICATE}"
    async with (
        tls_in_front_of(redis_server) as port,
        working(tls := at(f"rediss://localhost:{port}/0{trusted}")),
        QueuedFish(tls) as fish,
    ):
        assert (await fish.ask("psst")).text == "blub. psst"


async def test_tls_with_a_certificate_that_is_not_is_refused(redis_server: RedisServer) -> None:
    async with tls_in_front_of(redis_server) as port, linked(at(f"rediss://localhost:{port}/0")) as link:
        with pytest.raises(Refusal, match="TLS"):
            await asyncio.wait_for(link.ready(), 5)


@asynccontextmanager
async def saying(*lines: bytes) -> AsyncIterator[int]:
    """A port that answers each command with the next of `lines`, and with the last one for ever."""
    left = list(lines)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            for _ in re.findall(rb"\*\d+\r\n", data):
                writer.write(left.pop(0) if len(left) > 1 else left[0])

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_a_redis_that_is_still_loading_is_waited_for() -> None:
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    async with saying(loading, loading, b"+PONG\r\n") as port, linked(at(f"redis://127.0.0.1:{port}")) as link:
        await asyncio.wait_for(link.ready(), 5)


async def test_what_is_no_redis_is_refused() -> None:
    async with (
        saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port,
        linked(at(f"redis://127.0.0.1:{port}")) as link,
    ):
        with pytest.raises(Refusal, match="no Redis"):
            await asyncio.wait_for(link.ready(), 5)


async def test_a_replica_is_away_until_it_is_promoted(settings: Settings, redis_server: RedisServer) -> None:
    client = redis_server.client()
    client.replicaof("127.0.0.1", free_port())
    async with linked(settings) as link:
        with pytest.raises(Away, match="READONLY"):
            await link.run(WRITE, ["key"], "value")
        client.replicaof("NO", "ONE")
        assert await link.run(WRITE, ["key"], "value") == b"OK"


async def test_a_full_redis_says_so_from_within_scripts_too(settings: Settings, redis_server: RedisServer) -> None:
    redis_server.client().config_set("maxmemory", 1)
    async with linked(settings) as link:
        with pytest.raises(Full):
            await link.call("SET", "key", "value")
        with pytest.raises(Full):
            await link.run(WRITE, ["key"], "value")


async def test_no_error_quotes_what_was_sent(settings: Settings, redis_server: RedisServer) -> None:
    async with linked(settings) as link:
        for command in (
            ("NOSUCHCOMMAND", "a secret"),
            ("EVAL", "return redis.call('INCR', KEYS[1])", 1, "{guppy}:x a secret", "a secret"),
            ("EVAL", "error('a secret')", 0),
            ("SET", "a secret"),
        ):
            redis_server.client().set("{guppy}:x a secret", "not a number")
            with pytest.raises(Away) as error:
                await link.call(*command)
            assert "secret" not in str(error.value)
            assert error.value.__cause__ is None


async def test_an_address_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(Refusal) as refused:
        Link(at("redis://:hunter2@host:no-port/0"))
    assert "GUPPY_REDIS_URL" in refused.value.sentence
    assert "hunter2" not in refused.value.sentence
