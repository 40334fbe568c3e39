"""What every adapter knows of Guppy: a `Fish` is anything that can be asked and replies.

The engine in this process is a Fish (`local.LocalFish`); the far end of the Redis queue is one too
(`queue.QueuedFish`). Every question stands alone: a Fish never remembers.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reply:
    """What Guppy said: `text` is never empty; `prompt_cut` is True when the question was longer than his head."""

    text: str
    prompt_cut: bool = False


class FishError(Exception):
    """No reply will come. A person is told so in one line of `voice.say`, whose key is `line`."""

    line: str


class Asleep(FishError):
    """Nobody answered before the deadline, or the way to the fish (Redis) is cut."""

    line = "asleep"


class Busy(FishError):
    """Refused because too many questions are open; a later one may be answered."""

    line = "busy"


class Confused(FishError):
    """The fish tried and failed on this very question; asking it again will not help."""

    line = "confused"


class Fish(Protocol):
    """Anything that answers one question with one reply."""

    async def ask(self, prompt: str) -> Reply:
        """Answer `prompt`, as the person typed it (any text, the empty one too).

        Raises a `FishError` when there will be no reply. Cancelling the call withdraws the question.
        """
        ...
