"""The engine: the model's own numbers, the same reply in any company, and people who come and go."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guppylm import checkpoint, engine, native
from guppylm.conversation import IM_END
from guppylm.engine import NEVER, CudaMind, Engine, EngineBusy, Mind, Sampling, TorchMind, decode
from guppylm.model import GuppyLM, ModelConfig

PROMPTS = ["are you hungry", "hi", "my aunt bought an apple and a kiwi", "", "🐟🐟", "do you want food " * 40]
WILD = Sampling(temperature=3.0, top_k=0, min_p=0.0)  # every token has a chance


# Every way there is to run a model, where this machine has it.
PLACES: Any = [
    pytest.param(("cpu", "fp32"), id="cpu-fp32"),
    pytest.param(("cpu", "bf16"), id="cpu-bf16"),
    pytest.param(("cpu", "int8"), id="cpu-int8"),
    pytest.param(("cuda", "fp32"), id="cuda-fp32"),
    pytest.param(("cuda", "bf16"), id="cuda-bf16"),
]


def engine_at(place: tuple[str, Any], model: Path | str, **given: Any) -> Engine:
    """An engine at one of PLACES; skips the test where this machine doesn't have it."""
    device, precision = place
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if precision == "int8":
        try:
            native.library()
        except native.Unavailable as reason:
            pytest.skip(str(reason))
    return Engine.load(model, device=device, precision=precision, **given)


@pytest.fixture
async def fish(small_fish: Path) -> AsyncIterator[Engine]:
    ready = Engine.load(small_fish, device="cpu", max_batch=32, max_waiting=8)
    yield ready
    await ready.aclose()


def spoken_model(heads: int, layers: int) -> GuppyLM:
    """A model whose every layer has something to say."""
    torch.manual_seed(heads)
    model = GuppyLM(
        ModelConfig(
            vocab_size=60,
            max_position_embeddings=128,
            hidden_size=12 * heads,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=20,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


async def speaking(fish: Engine, replies: int = 1) -> None:
    """Wait until so many replies are under way."""
    deadline = time.monotonic() + 30
    while fish.running != replies:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def minds(model: GuppyLM, slots: int) -> dict[str, tuple[Mind, float]]:
    """Every mind of this machine, and how far its logits may lie from the model's own."""
    found: dict[str, tuple[Mind, float]] = {"cpu": (TorchMind(model, slots), 1e-4)}
    with contextlib.suppress(native.Unavailable):
        found["int8"] = native.NativeMind(native.NativeModel(model), slots), 0.5
    if torch.cuda.is_available():
        found["cuda"] = CudaMind(copy.deepcopy(model).cuda(), slots), 1e-4
    return found


@pytest.mark.parametrize("name", ["cpu", "int8", "cuda"])
@pytest.mark.parametrize(("heads", "layers"), [(1, 1), (3, 5), (6, 2)])
@torch.inference_mode()
def test_cached_logits_are_the_models_own(heads: int, layers: int, name: str) -> None:
    model = spoken_model(heads, layers)
    if name not in (found := minds(model, 4)):
        pytest.skip("not on this machine")
    mind, tolerance = found[name]
    ids = torch.randint(0, 60, (3, 128), generator=torch.Generator().manual_seed(0))
    lengths = [1, 7, 40]  # rows that stand at different positions in one batch
    expected = model(ids)

    def same(logits: Tensor, as_expected: Tensor) -> None:
        torch.testing.assert_close(logits.cpu(), as_expected, rtol=0, atol=tolerance)

    logits = mind.prefill(0, [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)])
    at = torch.tensor(lengths)
    rows = torch.arange(3)
    same(logits, expected[rows, at - 1])
    while at[-1] < 128:
        logits = mind.decode(ids[rows, at].tolist())
        same(logits, expected[rows, at])
        at += 1
    mind.move(0, 1)
    for position in range(int(at[0]), 128):  # the first row goes on to the end of the window, in two slots
        logits = mind.decode(ids[:1, position].expand(2).tolist())
        same(logits, expected[:1, position].expand(2, -1))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", ["small", checkpoint.DEFAULT_MODEL])
async def test_the_same_seed_gives_the_same_reply_in_any_company(
    small_fish: Path, model: str, place: tuple[str, str]
) -> None:
    fish = engine_at(place, small_fish if model == "small" else model, max_batch=32)
    try:
        # Company that asks for other settings, and of every size.
        settings = [WILD, Sampling(), Sampling(temperature=1.5, top_p=0.9), Sampling(top_k=3)]
        asked = [(PROMPTS[i % len(PROMPTS)], settings[i % 4], i) for i in range(32)]
        together = await asyncio.gather(*(fish.ask(prompt, sampling, seed=seed) for prompt, sampling, seed in asked))
        alone = [await fish.ask(prompt, sampling, seed=seed) for prompt, sampling, seed in asked[:12]]
        assert together[:12] == alone
        assert len({completion.text for completion in together}) > 16
    finally:
        await fish.aclose()


@pytest.mark.parametrize("place", PLACES)
def test_logits_are_the_same_to_the_last_bit_in_any_company(place: tuple[str, str]) -> None:
    """Of the fish that ships: small ones would not show it."""
    fish = engine_at(place, checkpoint.DEFAULT_MODEL, max_batch=32)
    asyncio.run(fish.aclose())
    mind = fish._voices[0].mind
    most = fish._voices[0].slots
    prompts = [fish.chat.encode_prompt(prompt).ids for prompt in PROMPTS]
    prompts = [prompts[i % len(prompts)] for i in range(most)]
    with torch.inference_mode():

        def first_and_next(company: int) -> Tensor:
            read = mind.prefill(0, prompts[:company])[0].clone()
            said = [mind.decode([100 + step + i for i in range(company)])[0].clone() for step in range(3)]
            return torch.stack([read, *said])

        alone = first_and_next(1)
        for company in (2, 3, 7, 15, 16, 17, most):
            assert torch.equal(first_and_next(min(company, most)), alone), company


def long_winded(fish: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The fish (of torch's arithmetic) with a token each 5 ms, and nobody stops before he must."""

    def slow(*given: Any) -> Tensor:
        time.sleep(0.005)
        return decode(*given)

    monkeypatch.setattr(engine, "decode", slow)
    fish._masks[:, IM_END] = NEVER
    return fish


async def test_replies_join_and_leave_between_tokens(small_fish: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fish = long_winded(Engine.load(small_fish, device="cpu", precision="fp32"), monkeypatch)
    long = asyncio.create_task(fish.ask("hi", WILD))
    await speaking(fish)
    short = await fish.ask("hi", Sampling(max_new_tokens=1))
    assert short.tokens == 3  # two of them thoughts
    assert not long.done()
    assert (await long).tokens > 100
    assert fish.running == fish.waiting == 0
    await fish.aclose()


async def test_the_wait_for_a_place_counts_to_the_first_word(small_fish: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fish = long_winded(Engine.load(small_fish, device="cpu", precision="fp32", max_batch=1), monkeypatch)
    words = Sampling(max_new_tokens=10)
    started = time.perf_counter()
    first = asyncio.create_task(fish.ask("hi", words))
    second = asyncio.create_task(fish.ask("hi", words))
    beginning = (await first).first_word
    ended = time.perf_counter() - started
    assert 0.010 < beginning < ended - 0.040, "two thoughts before it, nine words behind it"
    assert beginning + 0.045 < (await second).first_word < time.perf_counter() - started - 0.040
    await fish.aclose()


async def test_a_cancelled_reply_frees_its_slot(small_fish: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Engine.load(small_fish, device="cpu", precision="fp32", max_batch=1, max_waiting=1)
    long_winded(narrow, monkeypatch)
    try:
        first = asyncio.create_task(narrow.ask("hi", WILD))
        await speaking(narrow)
        queued = asyncio.create_task(narrow.ask("hi", WILD))
        await asyncio.sleep(0)
        queued.cancel()
        await asyncio.gather(queued, return_exceptions=True)
        assert narrow.waiting == 0
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await narrow.ask("hi", Sampling(max_new_tokens=2))).text
        assert narrow.running == 0
    finally:
        await narrow.aclose()


async def test_beyond_max_waiting_the_engine_is_busy(small_fish: Path) -> None:
    narrow = Engine.load(small_fish, device="cpu", max_batch=1, max_waiting=2)
    try:
        asked = await asyncio.gather(*(narrow.ask("hi", WILD) for _ in range(30)), return_exceptions=True)
        refused = [answer for answer in asked if isinstance(answer, EngineBusy)]
        answered = [answer for answer in asked if not isinstance(answer, BaseException)]
        assert len(refused) + len(answered) == 30
        assert len(answered) >= 3
        assert len(refused) >= 20
        assert (await narrow.ask("hi")).text
    finally:
        await narrow.aclose()


async def test_without_temperature_the_reply_is_always_the_same(fish: Engine) -> None:
    replies = {(await fish.ask("are you hungry", Sampling(temperature=0), seed=seed)).text for seed in range(4)}
    replies.add((await fish.ask("are you hungry", Sampling(temperature=5, top_k=1))).text)
    assert len(replies) == 1


async def test_a_reply_is_short_enough_never_empty_and_shows_no_markup(fish: Engine) -> None:
    for most in (1, 2, 5, None):
        sampling = Sampling(temperature=10, top_k=0, min_p=0, max_new_tokens=most)
        asked = await asyncio.gather(*(fish.ask(random.choice(PROMPTS), sampling, seed=seed) for seed in range(16)))
        for completion in asked:
            assert completion.text == completion.text.strip() != ""
            assert completion.topic == "food"
            assert completion.intent in ("fruit", "hungry")
            assert completion.tokens <= 2 + (most or fish.chat.window)
            assert not any(mark in completion.text for mark in ("<pad>", "<|im_", "<|food"))


async def test_a_long_prompt_is_cut_and_said_to_be(fish: Engine) -> None:
    assert (await fish.ask("word " * 1000)).prompt_cut
    assert not (await fish.ask("word")).prompt_cut


@pytest.mark.parametrize("seed", range(12))
async def test_the_pieces_of_a_stream_are_the_reply(fish: Engine, seed: int) -> None:
    """A wild fish speaks in bytes: characters are built of several tokens, and many never end."""
    pieces = [piece async for piece in fish.stream("hi", WILD, seed=seed)]
    assert "".join(pieces) == (await fish.ask("hi", WILD, seed=seed)).text
    assert all(pieces)


async def test_a_character_is_never_split(small_fish: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fish = Engine.load(small_fish, device="cpu", max_batch=1)
    said = [*fish.chat.encode_text("a 🐟 is wet."), IM_END]
    thought = fish.chat.encode_thought("food", "hungry")
    script = iter([*thought, *said])
    monkeypatch.setattr(fish._voices[0].mind, "choose", lambda *_: [next(script)])
    pieces = [piece async for piece in fish.stream("hi")]
    assert "".join(pieces) == "a 🐟 is wet."
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5
    await fish.aclose()


async def test_a_reader_who_leaves_a_stream_frees_the_slot(fish: Engine) -> None:
    stream = fish.stream("hi", WILD, seed=5)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await speaking(fish, 0)


def test_a_reader_whose_loop_is_gone_hurts_nobody_else(small_fish: Path) -> None:
    fish = Engine.load(small_fish, device="cpu")
    calls = 0

    def gone(piece: str) -> None:
        raise RuntimeError("Event loop is closed")

    async def others() -> None:
        nonlocal calls
        fish._submit("hi", WILD, 1, gone)
        completions = await asyncio.gather(*(fish.ask("hi", WILD, seed=seed) for seed in range(4)))
        calls = len(completions)
        await fish.aclose()

    asyncio.run(others())
    assert calls == 4


async def test_a_failure_reaches_who_asked_and_the_next_prompt_is_answered(
    small_fish: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fish = Engine.load(small_fish, device="cpu", precision="fp32")

    def fail(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "decode", fail)
    answers = await asyncio.gather(*(fish.ask("hi") for _ in range(3)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["out of memory"] * 3
    with pytest.raises(RuntimeError, match="out of memory"):
        async for _ in fish.stream("hi"):
            pass
    monkeypatch.undo()
    assert (await fish.ask("hi")).text
    assert fish.running == 0
    await fish.aclose()


async def test_the_event_loop_is_never_blocked_for_long(small_fish: Path) -> None:
    """How long the loop works at one thing, of its own processor time: waiting for a core on a busy machine is not its
    doing. 64 replies are under way and prompts of 4,000 characters arrive."""
    fish = Engine.load(small_fish, device="cpu", max_batch=64)
    loop = asyncio.get_running_loop()
    longest = 0.0

    def beat(last: float) -> None:
        nonlocal longest
        now = time.thread_time()
        longest = max(longest, now - last)
        loop.call_soon(beat, time.thread_time())

    async def ask(prompt: str, seed: int) -> None:
        await asyncio.sleep(seed * 0.005)
        await fish.ask(prompt, WILD, seed=seed)

    try:
        await fish.ask("hi")
        beat(time.thread_time())
        long = " ".join(f"{random.random()}" for _ in range(250))[:4000]
        await asyncio.gather(*(ask(long if seed % 4 == 0 else "hi", seed) for seed in range(64)))
    finally:
        await fish.aclose()
    assert longest < 0.005


async def test_a_closed_engine_finishes_what_is_under_way_and_takes_no_more(small_fish: Path) -> None:
    fish = Engine.load(small_fish, device="cpu")
    asked = asyncio.create_task(fish.ask("hi", WILD))
    await asyncio.sleep(0)
    await fish.aclose()
    assert (await asked).text
    with pytest.raises(RuntimeError, match="closed"):
        await fish.ask("hi")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 11}, "temperature is 11"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -1}, "min_p is -1"),
        ({"min_p": 1}, "min_p is 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
    ],
)
def test_a_setting_of_sampling_that_cannot_be_is_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Sampling(**values)


def chosen(mind: Mind, logits: Tensor, sampling: Sampling, draws: list[float]) -> list[int]:
    n, V = logits.shape
    return mind.choose(logits.contiguous(), torch.zeros(1, V), [0] * n, [sampling] * n, draws)


def choosers(vocabulary: int) -> list[Mind]:
    model = GuppyLM(ModelConfig(vocab_size=vocabulary, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    return [mind for name, (mind, _) in minds(model.eval().requires_grad_(False), 1).items() if name != "cuda"]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"temperature": 1}, [0.1, 0.5, 0.1, 0.3]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [0.03, 0.69, 0.03, 0.25]),
        ({"temperature": 1, "top_k": 2}, [0, 0.63, 0, 0.38]),
        ({"temperature": 1, "top_k": 10**30}, [0.1, 0.5, 0.1, 0.3]),
        ({"temperature": 1, "top_p": 0.7}, [0, 0.63, 0, 0.38]),
        ({"temperature": 1, "top_p": 0.01}, [0, 1, 0, 0]),
        ({"temperature": 1, "min_p": 0.5}, [0, 0.63, 0, 0.38]),
        ({"temperature": 1e-9}, [0, 1, 0, 0]),
    ],
)
def test_words_are_chosen_as_often_as_the_settings_say(sampling: dict[str, Any], expected: list[float]) -> None:
    full = Sampling(**{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **sampling})
    logits = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log().expand(1000, -1)
    for mind in choosers(4):
        tokens = chosen(mind, logits, full, [(i + 0.5) / 1000 for i in range(1000)])
        assert [tokens.count(token) / 1000 for token in range(4)] == pytest.approx(expected, abs=0.011)


@torch.inference_mode()
def test_every_mind_chooses_the_same_of_the_same_logits() -> None:
    logits = torch.randn(40, 700, generator=torch.Generator().manual_seed(0)) * 3
    for sampling in (Sampling(), Sampling(top_k=0), WILD, Sampling(top_k=64, min_p=0), Sampling(temperature=0)):
        draws = [i / 40 for i in range(40)]
        assert len({tuple(chosen(mind, logits, sampling, draws)) for mind in choosers(700)}) == 1


@pytest.mark.parametrize("draw", [0.0, 0.5, 0.9999999999999999])
def test_what_is_masked_is_never_chosen(draw: float) -> None:
    for mind in choosers(4):
        logits = torch.tensor([[NEVER, 1.0, NEVER, 1.0]])
        assert chosen(mind, logits, Sampling(temperature=10, top_k=0, min_p=0), [draw])[0] in (1, 3)


@pytest.mark.parametrize("device", ["cuda:77", "submarine", "meta"])
def test_a_device_that_is_not_here_is_named(small_fish: Path, device: str) -> None:
    with pytest.raises(ValueError, match=device):
        Engine.load(small_fish, device=device)


def test_a_precision_that_is_none_is_named(small_fish: Path) -> None:
    with pytest.raises(ValueError, match="fp7"):
        Engine.load(small_fish, device="cpu", precision="fp7")  # type: ignore[arg-type]


@pytest.fixture
def fresh_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Native code as on a machine that never ran it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    native.has_tiles.cache_clear()
    yield
    native.library.cache_clear()
    native.has_tiles.cache_clear()


@pytest.mark.usefixtures("fresh_native")
@torch.inference_mode()
def test_with_and_without_tiles_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spoken_model(3, 2)
    try:
        tiles = native.has_tiles()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    if not tiles:
        pytest.skip("no tiles here")
    prompts = [list(range(7)), list(range(50))]
    with_tiles = native.NativeMind(native.NativeModel(model), 2).prefill(0, prompts)
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-mno-amx-int8"])
    native.library.cache_clear()
    native.has_tiles.cache_clear()
    assert not native.has_tiles()
    assert torch.equal(native.NativeMind(native.NativeModel(model), 2).prefill(0, prompts), with_tiles)


@pytest.mark.usefixtures("fresh_native")
def test_code_compiled_ahead_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SOURCE", Path(shutil.copy(native.SOURCE, tmp_path)))
    if not native._ahead() or not shutil.which("cc"):
        pytest.skip("no compiler here, or another kind of processor")
    for path, told in native._ahead().items():
        native._compile(path, told)
    monkeypatch.setenv("PATH", "")
    native.NativeModel(spoken_model(1, 1))
    native.SOURCE.write_text(native.SOURCE.read_text() + "\n")  # what was compiled is out of date now
    native.library.cache_clear()
    with pytest.raises(native.Unavailable, match="no C compiler"):
        native.library()


@pytest.mark.usefixtures("fresh_native")
async def test_without_a_compiler_the_fish_speaks_too(
    small_fish: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="no C compiler"):
        Engine.load(small_fish, device="cpu", precision="int8")
    with caplog.at_level("INFO"):
        fish = Engine.load(small_fish, device="cpu")
    assert "no C compiler" in caplog.text
    assert (await fish.ask("hi")).text
    await fish.aclose()


def test_starting_imports_no_compiler(small_fish: Path) -> None:
    """torch._dynamo alone takes a second to import: a third of what a first reply may take."""
    code = (
        "import sys, asyncio; from guppylm.engine import Engine\n"
        f"fish = Engine.load({str(small_fish)!r}, device='cpu')\n"
        "print(asyncio.run(fish.ask('hi')).text); sys.exit('torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_the_loaded_model_learns_nothing(small_fish: Path) -> None:
    loaded = checkpoint.load(small_fish)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
