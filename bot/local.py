"""LocalFish: the engine in this process, as a Fish. With it, one process and one token are a complete bot.

Of bot, only this module and the worker know guppylm; importing it costs nothing, `load` imports torch.
"""

import asyncio
from typing import TYPE_CHECKING

from bot import health, logs
from bot.fish import Asleep, Busy, Confused, Reply
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings

if TYPE_CHECKING:
    from guppylm.engine import Engine

log = logs.get("local")


async def load(settings: Settings) -> "Engine":
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


class LocalFish:
    """Asks `engine` directly. The caller closes the engine."""

    def __init__(self, engine: "Engine", settings: Settings) -> None:
        self._engine = engine
        self._deadline = settings.deadline
        self.progress = health.Progress(lambda: engine.steps, lambda: engine.running > 0)

    async def ask(self, prompt: str) -> Reply:
        """As `Fish.ask`."""
        from guppylm.engine import EngineBusy

        try:
            async with asyncio.timeout(self._deadline):
                completion = await self._engine.ask(prompt)
        except TimeoutError:
            raise Asleep from None
        except EngineBusy:
            raise Busy from None
        except Exception as error:  # the person gets a line, the operator the place; the other chats go on
            log.error("failed", exc_info=error)
            raise Confused from None
        return Reply(completion.text, completion.prompt_cut)
