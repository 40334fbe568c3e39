"""How much one person may ask, so that nobody pushes the others from the glass.

Beside the fish, not in it: the queue knows no people, and a Fish answers whoever asks. An adapter takes a `turn` for
each question before it asks:

    async with limiter.turn(person="42", message="1001") as turn:
        if turn.verdict is Verdict.WELCOME:
            reply = await fish.ask(prompt)
        elif turn.verdict is not Verdict.DUPLICATE and await turn.may_notice():
            say(voice.say(turn.verdict.value, locale))

Every notice (of a `FishError` too) goes through `turn.may_notice()`: one a person and minute, then silence. Where the
platform demands an answer (a slash command), it may be given all the same, to that person only.

Who a person is never leaves the adapter: what is counted stands under a hash that is keyed with the platform's token
and the hour, so that it can't be tried out by who sees Redis, and fades soon. A person has a bucket of `person_burst`
questions that fills up at `person_per_minute`; all that is kept of it is the time at which it is full again.

`RedisLimiter` counts across processes, `LocalLimiter` in this one.
"""

import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from pydantic import SecretStr

from bot.link import Away, Link, Script
from bot.settings import Settings

ROTATION = 3600
"""Seconds for which a person has the same hash."""
SEEN = 180.0
"""Seconds for which the same message is not taken twice: platforms replay events after a reconnect. What is older than
120 seconds the adapters leave alone; a minute more is for clocks that differ."""
NOTICE = 60.0
"""Seconds between two notices to the same person."""


class Verdict(StrEnum):
    """What becomes of a question. Of the refusals but DUPLICATE, the value is the key of the line in `voice`."""

    WELCOME = "welcome"
    TOO_FAST = "too_fast"
    """This person asks faster than one fish can chew."""
    STILL_THINKING = "still_thinking"
    """This person's last question is still open."""
    DUPLICATE = "duplicate"
    """This very message was taken before: say nothing."""


class Turn(Protocol):
    """One person's place at the glass for one question."""

    @property
    def verdict(self) -> Verdict: ...

    async def may_notice(self) -> bool:
        """Whether this person may be told now why there is no reply: True once a minute, then silence."""
        ...


class Limiter(Protocol):
    def turn(self, person: str, message: str) -> AbstractAsyncContextManager[Turn]:
        """Take a turn for `person` (the platform's id) with the question `message` (an id, unique on the platform).

        A WELCOME turn holds the person's one place until the block ends. Never raises for want of Redis: it then
        counts in this process alone.
        """
        ...

    async def aclose(self) -> None: ...


def limiter(settings: Settings, platform: Literal["discord", "telegram"]) -> Limiter:
    """The limiter for one platform's people: across processes when the settings name a Redis, else in this one."""
    if settings.redis_url is None:
        return LocalLimiter(settings)
    token = settings.discord_token if platform == "discord" else settings.telegram_token
    return RedisLimiter(settings, platform, token)


class _Scramble:
    """Names that stand for ids and can't be turned back without the key."""

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.sha256(key).digest()

    def message(self, id: str) -> str:
        return hashlib.blake2b(f"message {id}".encode(), key=self._key, digest_size=16).hexdigest()

    def person(self, id: str) -> str:
        hour = int(time.time() // ROTATION)
        return hashlib.blake2b(f"person {id} {hour}".encode(), key=self._key, digest_size=16).hexdigest()


@dataclass(slots=True)
class _LocalTurn:
    verdict: Verdict
    person: str
    told: dict[str, float]

    async def may_notice(self) -> bool:
        now = time.monotonic()
        if self.told.get(self.person, 0.0) > now:
            return False
        self.told[self.person] = now + NOTICE
        return True


class LocalLimiter:
    """Counts in this process."""

    def __init__(self, settings: Settings) -> None:
        self._scramble = _Scramble(secrets.token_bytes(32))
        self._interval = 60.0 / settings.person_per_minute
        self._burst = settings.person_burst
        # Name -> when the entry means nothing any more, in time.monotonic.
        self._seen: dict[str, float] = {}
        self._full_again: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._open: set[str] = set()
        self._forget_at = 0.0

    @asynccontextmanager
    async def turn(self, person: str, message: str) -> AsyncIterator[Turn]:
        """As `Limiter.turn`."""
        name = self._scramble.person(person)
        turn = _LocalTurn(self._judge(name, self._scramble.message(message)), name, self._told)
        try:
            yield turn
        finally:
            if turn.verdict is Verdict.WELCOME:
                self._open.discard(name)

    async def aclose(self) -> None:
        pass

    def _judge(self, person: str, message: str) -> Verdict:
        now = time.monotonic()
        self._forget(now)
        if self._seen.get(message, 0.0) > now:
            return Verdict.DUPLICATE
        self._seen[message] = now + SEEN
        if person in self._open:
            return Verdict.STILL_THINKING
        full_again = max(self._full_again.get(person, 0.0), now) + self._interval
        if full_again - now > self._burst * self._interval:
            return Verdict.TOO_FAST
        self._full_again[person] = full_again
        self._open.add(person)
        return Verdict.WELCOME

    def _forget(self, now: float) -> None:
        if now < self._forget_at:
            return
        self._forget_at = now + NOTICE
        for names in (self._seen, self._full_again, self._told):
            for name in [name for name, until in names.items() if until <= now]:
                del names[name]


TAKE_TURN = Script(
    """
-- seen, open, rate | place, seen ms, open ms, interval ms, burst
local seen, open, rate = KEYS[1], KEYS[2], KEYS[3]
local place, interval, burst = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[5])
if redis.call('GET', open) == place then return 'welcome' end  -- asked again after a broken connection
if not redis.call('SET', seen, '', 'NX', 'PX', ARGV[2]) then return 'duplicate' end
if redis.call('EXISTS', open) == 1 then return 'still_thinking' end
-- The key ends when the bucket is full again, so what is left of its life is what is missing in the bucket.
local missing = math.max(redis.call('PTTL', rate), 0) + interval
if missing > burst * interval then return 'too_fast' end
redis.call('SET', rate, '', 'PX', string.format('%.0f', missing))
redis.call('SET', open, place, 'PX', ARGV[3])
return 'welcome'
"""
)

END_TURN = Script(
    """
-- open | place
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
)


def _key(what: str, name: str) -> str:
    return f"{{guppy}}:limit:{what}:{name}"


@dataclass(slots=True)
class _RedisTurn:
    verdict: Verdict
    person: str
    here: Turn
    link: Link

    async def may_notice(self) -> bool:
        if not await self.here.may_notice():
            return False
        try:
            told = await self.link.call("SET", _key("told", self.person), "", "NX", "PX", int(NOTICE * 1000))
        except Away:
            return True
        return told is not None


class RedisLimiter:
    """Counts across all processes of a platform, through Redis.

    What this process alone would refuse doesn't get that far, so a flood costs Redis nothing, and while Redis is away
    this process's own count is what holds.
    """

    def __init__(self, settings: Settings, platform: str, token: SecretStr | None) -> None:
        self._here = LocalLimiter(settings)
        self._link = Link(settings)
        # The same in every process with the same token, and in no store.
        self._scramble = _Scramble(f"{platform} {token.get_secret_value() if token else ''}".encode())
        self._interval = 60_000 / settings.person_per_minute
        self._burst = settings.person_burst
        self._open = int(settings.deadline * 1000) + 5000  # a little longer than any question lives

    @asynccontextmanager
    async def turn(self, person: str, message: str) -> AsyncIterator[Turn]:
        """As `Limiter.turn`."""
        name = self._scramble.person(person)
        keys = [_key("seen", self._scramble.message(message)), _key("open", name), _key("rate", name)]
        place = secrets.token_hex(8)
        async with self._here.turn(person, message) as here:
            verdict, held = here.verdict, False
            if verdict is Verdict.WELCOME:
                with suppress(Away):
                    answer: bytes = await self._link.run(
                        TAKE_TURN, keys, place, int(SEEN * 1000), self._open, self._interval, self._burst
                    )
                    verdict = Verdict(answer.decode())
                    held = verdict is Verdict.WELCOME
            try:
                yield _RedisTurn(verdict, name, here, self._link)
            finally:
                if held:
                    with suppress(Away):  # the key ends by itself
                        await self._link.run(END_TURN, keys[1:2], place)

    async def aclose(self) -> None:
        await self._link.aclose()
