"""The engine in this process: loaded, asked and counted, and as a Fish. With `LocalFish`, one process and one token are
a complete bot; the worker loads and asks its engine in the same way.

Of bot, only this module and the worker know guppylm; importing it costs nothing, `load` imports torch.
"""

import asyncio
import secrets
import time
from typing import Protocol

from bot import health, logs, metrics
from bot.fish import Asleep, Busy, Confused, Reply
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings

log = logs.get("local")


class Completion(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def prompt_cut(self) -> bool: ...
    @property
    def tokens(self) -> int: ...
    @property
    def first_word(self) -> float: ...


class Engine(Protocol):
    """What the service needs of `guppylm.engine.Engine`."""

    @property
    def steps(self) -> int: ...
    @property
    def running(self) -> int: ...
    async def ask(self, prompt: str, /, *, seed: int) -> Completion: ...
    async def aclose(self) -> None: ...


async def load(settings: Settings) -> Engine:
    """The engine with the model of the settings. Raises `Refusal` when there is none that fits."""
    try:
        from guppylm.checkpoint import ModelError
        from guppylm.engine import Engine
    except ModuleNotFoundError as missing:
        raise Refusal(
            f"The fish needs {missing.name}, which is not installed here: pip install 'guppylm[model]'. (Or set "
            "GUPPY_REDIS_URL and run a worker elsewhere.)",
            ExitCode.MODEL,
        ) from None
    try:
        return await asyncio.to_thread(
            Engine.load, settings.model, device=settings.device, max_batch=settings.max_batch
        )
    except (ModelError, ValueError) as error:  # ValueError: a device that this machine doesn't have
        raise Refusal(str(error), ExitCode.MODEL) from None


async def think(engine: Engine, prompt: str, id: str) -> Completion:
    """Ask `engine`, and count what an operator wants to know of it.

    The question's random id (hexadecimal) is also the seed of its reply: whoever answers it, here or through the queue,
    a second worker after the first one died, says the same (with the same weights and precision).
    """
    started = time.perf_counter()
    with metrics.IN_HAND.track_inprogress():
        completion = await engine.ask(prompt, seed=int(id, 16))
    metrics.FIRST_WORD.observe(completion.first_word)
    metrics.INFER_SECONDS.observe(time.perf_counter() - started)
    metrics.TOKENS.inc(completion.tokens)
    return completion


class LocalFish:
    """Asks `engine` directly. The caller closes the engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._deadline = settings.deadline
        self.progress = health.Progress(lambda: engine.steps, lambda: engine.running > 0)

    async def ask(self, prompt: str) -> Reply:
        """As `Fish.ask`."""
        from guppylm.engine import EngineBusy

        id = secrets.token_hex(16)
        try:
            async with asyncio.timeout(self._deadline):
                completion = await think(self._engine, prompt, id)
        except TimeoutError:
            raise Asleep from None
        except EngineBusy:
            raise Busy from None
        except Exception as error:  # the person gets a line, the operator the place; the other chats go on
            log.error("failed", id=id, exc_info=error)
            raise Confused from None
        return Reply(completion.text, completion.prompt_cut)
