"""The fish in this process: `bot/local.py`, with an engine without a model."""

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY

from bot.fish import Asleep, Busy, Confused, Reply
from bot.local import LocalFish, load
from bot.refusal import ExitCode, Refusal
from bot.settings import Settings
from guppylm import checkpoint
from guppylm.engine import EngineBusy
from tests.standins.engine import StandInEngine
from tests.standins.processes import until


def fish(engine: Any, **settings: Any) -> LocalFish:
    return LocalFish(cast(Any, engine), Settings.model_validate(settings))


async def test_it_answers_with_what_the_engine_says() -> None:
    engine = StandInEngine(window=3)
    assert await fish(engine).ask("hi") == Reply("blub. hi", prompt_cut=False)
    assert await fish(engine).ask("hello") == Reply("blub. hel", prompt_cut=True)
    await engine.aclose()


async def test_it_counts_as_a_worker_does() -> None:
    names = ("guppy_first_word_seconds_count", "guppy_infer_seconds_count", "guppy_tokens_total")
    before = [REGISTRY.get_sample_value(name) or 0.0 for name in names]
    engine = StandInEngine(0.02, tokens=8)
    asking = asyncio.gather(*(fish(engine).ask("hi") for _ in range(3)))
    await until(lambda: engine.running == 3)
    assert REGISTRY.get_sample_value("guppy_in_hand") == 3
    await asking
    assert [(REGISTRY.get_sample_value(name) or 0.0) - was for name, was in zip(names, before, strict=True)] == [
        3,
        3,
        24,
    ]
    assert REGISTRY.get_sample_value("guppy_in_hand") == 0
    await engine.aclose()


async def test_an_engine_that_takes_too_long_is_asleep() -> None:
    engine = StandInEngine(0.1, 100)
    with pytest.raises(Asleep):
        await asyncio.wait_for(fish(engine, deadline=0.2).ask("hi"), 1)
    await engine.aclose()


async def test_an_engine_that_fails_is_confused() -> None:
    with pytest.raises(Confused):
        await fish(StandInEngine()).ask("(raise)")


async def test_a_full_engine_is_busy() -> None:
    class Full(StandInEngine):
        async def ask(self, prompt: str, *, seed: int) -> Any:
            raise EngineBusy

    with pytest.raises(Busy):
        await fish(Full()).ask("hi")


async def test_a_model_that_does_not_load_is_refused_by_name(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint.find(checkpoint.DEFAULT_MODEL), damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for model, named in ((tmp_path / "nothing", "nothing"), (damaged, "model.safetensors")):
        with pytest.raises(Refusal, match=named) as refused:
            await load(Settings.model_validate({"model": str(model)}))
        assert refused.value.exit_code is ExitCode.MODEL
