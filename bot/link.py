"""The way to Redis: two connections a process, whatever the load, and only two errors.

Commands that are asked for while a round trip is under way go into the next one together, so one connection carries
thousands of questions a second; a second one is for the commands that wait inside Redis (`XREAD BLOCK`). Everything
that can go wrong becomes `Away` (Redis does not serve us now) or one of its two kinds; none of their messages holds
an argument of a command, so none can carry what a person typed.
"""

import asyncio
import hashlib
import re
import ssl
import time
from typing import Any, NoReturn
from urllib.parse import urlsplit

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from bot import logs, metrics
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings

TIMEOUT = 4.0
"""Seconds after which a silent Redis counts as gone. Longer than any BLOCK."""
BLOCK = 1000
"""Milliseconds for which a read waits inside Redis. Short, because a process that stops lets it end by itself."""
BATCH = 256
"""Commands in one round trip at most: what a reply waits for behind others, without holding up the rest."""

log = logs.get("link")


class Away(Exception):
    """Redis does not serve us now: unreachable, silent, loading, read-only... `str()` is a short reason."""


class Full(Away):
    """Redis has reached its `maxmemory`."""


class Denied(Away):
    """Redis is there and refuses us: password, user, permission or certificate."""


class Script:
    """A Lua script, called by its hash and sent whole when Redis doesn't know it (any more)."""

    def __init__(self, lua: str) -> None:
        self.lua = lua
        self.sha = hashlib.sha1(lua.encode()).hexdigest()


Argument = bytes | str | int | float


class Link:
    """Commands to the Redis of the settings. Connects at the first use and again after each loss."""

    def __init__(self, settings: Settings) -> None:
        assert settings.redis_url is not None, "a Link needs GUPPY_REDIS_URL"
        url = settings.redis_url.get_secret_value()
        options: dict[str, Any] = {
            "protocol": 2,
            # The round trip has its own; redis-py's (wait_for, on Python 3.11) can swallow a cancellation.
            "socket_timeout": None,
            "socket_connect_timeout": TIMEOUT,
            "retry": Retry(NoBackoff(), 0),  # when to try again is decided here
        }
        if settings.redis_password is not None:
            options["password"] = settings.redis_password.get_secret_value()
        try:
            pool = ConnectionPool.from_url(url, **options)
        except ValueError:  # its message would quote the address with the password
            raise Refusal("GUPPY_REDIS_URL is no address like redis://host:6379/0.", ExitCode.SETTINGS) from None
        self.address = _address(url)
        self._commands: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._blocking: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._waiting: list[tuple[tuple[Argument, ...], asyncio.Future[Any]]] = []
        self._sender: asyncio.Task[None] | None = None
        self._block = asyncio.Lock()
        self._lost_at: float | None = None
        self._reasons: set[str] = set()

    async def ready(self) -> None:
        """Wait with back-off until Redis serves us. Raises `Refusal` when waiting would not help."""
        pause = 0.1
        while True:
            try:
                await self.call("PING")
                return
            except Denied as denied:
                raise Refusal(
                    f"Redis at {self.address} refuses us ({denied}). Check GUPPY_REDIS_URL and GUPPY_REDIS_PASSWORD.",
                    ExitCode.REDIS,
                ) from None
            except Away:
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)

    async def call(self, *command: Argument) -> Any:
        """The answer to one command. May be sent twice if the connection breaks, so ask only what can be repeated.

        Raises `Away`.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, answer))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="link to Redis")
        return await answer

    async def run(self, script: Script, keys: list[str], *arguments: Argument) -> Any:
        """The answer of `script`; errors and repetition as `call`."""
        try:
            return await self.call("EVALSHA", script.sha, len(keys), *keys, *arguments)
        except _UnknownScript:
            return await self.call("EVAL", script.lua, len(keys), *keys, *arguments)

    async def block(self, *command: Argument) -> Any:
        """The answer to a command that waits inside Redis, at most BLOCK. Sent once. Raises `Away`."""
        async with self._block:
            [answer] = await self._round_trip(self._blocking, [command])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def aclose(self) -> None:
        if self._sender is not None:
            await asyncio.wait([self._sender])
        await self._commands.disconnect()
        await self._blocking.disconnect()

    async def _send(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
            await self._send_batch([(command, answer) for command, answer in batch if not answer.done()])

    async def _send_batch(self, batch: list[tuple[tuple[Argument, ...], asyncio.Future[Any]]]) -> None:
        commands = [command for command, _ in batch]
        answers: list[Any]
        try:
            stale = self._commands.is_connected
            try:
                answers = await self._round_trip(self._commands, commands)
            except Away as away:
                if not stale or isinstance(away, _Silent):
                    raise
                # An idle connection is cut by many things on the way; that alone is no outage.
                answers = await self._round_trip(self._commands, commands)
        except Away as away:
            answers = [away] * len(batch)
        for (_, waiting), answer in zip(batch, answers, strict=True):
            if waiting.done():
                continue
            if isinstance(answer, Exception):
                waiting.set_exception(answer)
            else:
                waiting.set_result(answer)

    async def _round_trip(self, connection: AbstractConnection, commands: list[tuple[Argument, ...]]) -> list[Any]:
        """The answers to `commands`, an `Away` where Redis refused one. Raises `Away` when none came."""
        try:
            async with asyncio.timeout(TIMEOUT):
                if not connection.is_connected:
                    await connection.connect()  # type: ignore[no-untyped-call]
                packed = b"".join(map(hiredis.pack_command, commands))  # type: ignore[arg-type]  # its stub says one
                await connection.send_packed_command(packed, check_health=False)
                answers = [await self._answer(connection) for _ in commands]
        except (exceptions.RedisError, OSError) as error:
            await connection.disconnect(nowait=True)
            self._lost(error)
        except BaseException:  # cancelled in the middle: what is still under way would answer the next command
            await connection.disconnect(nowait=True)
            raise
        refused = next((answer for answer in answers if isinstance(answer, _NotServing | Denied)), None)
        if refused is not None:
            await connection.disconnect(nowait=True)  # another server may stand behind the same name by now
            self._note(refused)
        elif self._lost_at is not None:
            log.info("redis is back", seconds=round(time.monotonic() - self._lost_at, 1))
            metrics.REDIS_RECONNECTS.inc()
            self._lost_at = None
            self._reasons.clear()
        return answers

    async def _answer(self, connection: AbstractConnection) -> Any:
        try:
            return await connection.read_response()
        except exceptions.ConnectionError as error:
            if isinstance(error, exceptions.AuthenticationError | exceptions.BusyLoadingError):
                return _refusal(error)
            raise
        except exceptions.ResponseError as error:
            return _refusal(error)

    def _lost(self, error: Exception) -> NoReturn:
        away = _refusal(error)
        self._note(away)
        raise away from None

    def _note(self, away: Away) -> None:
        """Log a loss, once for each of its reasons."""
        if self._lost_at is None:
            self._lost_at = time.monotonic()
        if str(away) not in self._reasons:
            self._reasons.add(str(away))
            log.warning("redis is away", address=self.address, reason=str(away))


class _UnknownScript(Away):
    pass


class _NotServing(Away):
    pass


class _Silent(Away):
    pass


# The first word of an error says what it is; from inside a script, Redis 6 puts the word into the middle.
_KINDS: dict[str, type[Away]] = {
    "NOSCRIPT": _UnknownScript,
    "OOM": Full,
    "READONLY": _NotServing,
    "LOADING": _NotServing,
    "MASTERDOWN": _NotServing,
    "NOREPLICAS": _NotServing,
    "NOAUTH": Denied,
    "WRONGPASS": Denied,
    "NOPERM": Denied,
}
_CODE = re.compile(r"\b(" + "|".join([*_KINDS, "NOGROUP", "UNBLOCKED"]) + r")\b")
_CLASSES: dict[type[Exception], str] = {
    # redis-py takes the code away from the messages of the errors that it knows.
    exceptions.NoScriptError: "NOSCRIPT",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.AuthenticationError: "WRONGPASS",
    exceptions.AuthorizationError: "NOPERM",
}


def _refusal(error: Exception) -> Away:
    """The error as one of ours, without anything that it quotes."""
    code = _CLASSES.get(type(error))
    if code is None and (found := _CODE.search(str(error))):
        code = found[1]
    if code is not None:
        return _KINDS.get(code, Away)(code)
    if isinstance(error, exceptions.InvalidResponse):
        return Denied("what answers there is no Redis")
    if isinstance(error, exceptions.ResponseError):  # no way to be away, but a mistake of ours or of the server's
        where = re.search(r"WRONGTYPE|user_script:\d+", str(error))
        reason = where[0] if where else type(error).__name__
        log.error("redis failed a command", reason=reason)
        return Away(reason)
    if isinstance(error, TimeoutError | exceptions.TimeoutError):
        return _Silent("no answer in time")
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLError):
        return Denied(f"TLS: {cause.reason or type(cause).__name__}")
    return Away(type(cause or error).__name__)


def _address(url: str) -> str:
    """Where the address leads, without its user and password."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
