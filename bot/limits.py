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

Who a person is never leaves the adapter: what is counted stands under a keyed hash whose key changes every hour
and lies in no store. `RedisLimiter` counts across processes, `LocalLimiter` in this one.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from bot.settings import Settings

ROTATION = 3600
"""Seconds for which a person has the same hash."""
SEEN = 600
"""Seconds for which the same message is not taken twice: platforms replay events after a reconnect."""
NOTICE = 60
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
    verdict: Verdict

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
