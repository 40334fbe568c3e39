"""The engine: prompts in, replies out, as many at once as there are.

How a reply comes to be, top to bottom in this file:

    prefill   the prompt goes through the model once; what each layer needs of it later (keys, values) is kept
    decode    one token a step for every reply under way, all in one batch, looking back into the cache
    sampling  from the last logits to the next token: first the thought (greedily), then the words (by chance)

Replies join and leave between steps (continuous batching): a short one never waits for a long one, and a newcomer
never waits for a batch to end. Threads of the engine's own do the arithmetic; `ask` and `stream` are for asyncio.

Everything random about a reply comes from its own seed, and its numbers do not depend on what else is in the batch,
to the last bit: in fp32 no product has fewer than 16 rows (smaller ones are summed in another order), on a GPU every
step has the same shape, and in int8 (guppylm.native, the fastest on a CPU) sums have no rounding.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from guppylm import checkpoint, native
from guppylm.conversation import IM_END, ChatFormat, Prompt
from guppylm.model import Block, GuppyLM

log = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "int8"]

# Products of fewer rows are summed in another order, so a lone reply would differ in its last bits from one in company.
LEAST_ROWS = 16
BLOCK = 32
# What is said when a model has no words at all (an untrained one: a trained fish always finds some).
SPEECHLESS = "blub."
# A temperature of 0, as a divisor.
COLDEST = 1e-6
# A logit that no other reaches. (Not -inf: native code is faster where nothing is infinite.)
NEVER = -1e30
# States of a reply: rows of Engine._masks. From _TOPIC on it still thinks; the intents of each topic follow.
_FIRST_WORD, _NEXT_WORD, _TOPIC = 0, 1, 2


class EngineBusy(Exception):
    """More requests are waiting than `max_waiting`; this one was refused at once."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next word is chosen. Each setting is checked; ValueError says what is allowed.

    temperature: 0 always takes the likeliest token; 1 follows the model's own probabilities.
    top_k: only the k likeliest tokens; 0 for all.
    top_p: only the likeliest tokens that together reach this probability; 1 for all.
    min_p: only tokens at least this probable relative to the likeliest; 0 for all. top_p counts what these two leave.
    max_new_tokens: a reply ends after this many tokens at the latest; None for what the window holds.
    """

    temperature: float = 0.5
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.05
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature is {self.temperature}; choose 0 (always the likeliest word) to 10.")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; choose a whole number, 0 for no limit.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; choose more than 0, up to 1 for no limit.")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}; choose 0 for no limit, up to less than 1.")
        if self.max_new_tokens is not None and (not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1):
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; choose a whole number, 1 or more.")

    @property
    def divisor(self) -> float:
        """What logits are divided by: the temperature, and never zero."""
        return max(self.temperature, COLDEST)

    def most(self, vocabulary: int) -> int:
        """How many of so many tokens can be chosen at all. A top_k of 0 is all; greedily, only the first counts."""
        return 1 if self.temperature == 0 else min(self.top_k or vocabulary, vocabulary)


@dataclass(frozen=True)
class Completion:
    """A reply. `topic` is what Guppy thought it is about (None if the model does not think), `prompt_cut` whether the
    prompt was too long for the window, `tokens` how many were generated, thoughts included, `first_word` the seconds
    from the question to the reply's first token behind them."""

    text: str
    prompt_cut: bool
    tokens: int
    topic: str | None = None
    intent: str | None = None
    first_word: float = field(default=0.0, compare=False)


@dataclass(eq=False)
class _Request:
    """One reply under way. Only the engine's thread touches it once it is queued, except `cancelled`."""

    prompt: Prompt
    sampling: Sampling
    seed: int
    done: Future[Completion]
    on_token: Callable[[str], object] | None = None
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)  # generated: the thought, then the words
    topic: int | None = None
    intent: int | None = None
    mask: int = 0  # row of Engine._masks: which tokens may come next
    limit: int = 0
    shown: str = ""
    first_word: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.asked = time.perf_counter()


class Cache:
    """Keys and values of every reply under way, allocated once: (layers, slots, heads, positions, channels).

    Replies occupy slots 0 to n-1 without gaps, so a step reads one block of memory.
    """

    def __init__(self, model: GuppyLM, slots: int) -> None:
        config = model.config
        shape = (
            config.num_hidden_layers,
            slots,
            config.num_attention_heads,
            config.max_position_embeddings,
            config.hidden_size // config.num_attention_heads,
        )
        weight = model.tok_emb.weight
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.length = torch.zeros(slots, dtype=torch.long, device=weight.device)

    def move(self, source: int, target: int) -> None:
        """Move a reply to another slot."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]
        self.length[target] = self.length[source]


def prefill(model: GuppyLM, cache: Cache, slots: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Read whole prompts, `ids` (n, T) of `lengths` (n,), into `slots` (n,). Returns the logits after each, (n, V)."""
    T = ids.shape[1]
    # Padding stands behind the prompt, where no real position looks; the next token overwrites it in the cache.
    x = model.tok_emb(ids) + model.pos_emb.weight[:T]
    for layer, block in enumerate(cast(Iterable[Block], model.blocks)):
        q, k, v = _split(block.attn.qkv(block.norm1(x)), block.attn.heads)
        cache.keys[layer, slots, :, :T], cache.values[layer, slots, :, :T] = k, v
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.out(heard.transpose(1, 2).flatten(2))
        x = x + block.ffn(block.norm2(x))
    cache.length[slots] = lengths
    last = x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
    last = F.pad(last, (0, 0, 0, max(0, LEAST_ROWS - len(last))))
    logits: Tensor = model.lm_head(model.norm(last))
    return logits[: len(lengths)]


def decode(model: GuppyLM, cache: Cache, ids: Tensor, longest: int) -> Tensor:
    """One step: `ids` (n,) are the newest tokens of slots 0 to n-1, whose replies are then at most `longest` tokens
    long. Returns the logits for the next ones, (n, V)."""
    n, T = len(ids), longest
    positions = cache.length[:n].clamp(max=T - 1)  # a slot that nobody has may stand anywhere
    rows = torch.arange(n, device=ids.device)
    unseen = torch.arange(T, device=ids.device) > positions[:, None]  # (n, T)
    bias = torch.zeros(n, 1, 1, T, dtype=model.tok_emb.weight.dtype, device=ids.device)
    bias.masked_fill_(unseen[:, None, None], float("-inf"))
    x = (model.tok_emb(ids) + model.pos_emb(positions))[:, None]
    for layer, block in enumerate(cast(Iterable[Block], model.blocks)):
        q, k, v = _split(block.attn.qkv(block.norm1(x)), block.attn.heads)
        keys, values = cache.keys[layer], cache.values[layer]
        keys[rows, :, positions], values[rows, :, positions] = k[:, :, 0], v[:, :, 0]
        heard = F.scaled_dot_product_attention(q, keys[:n, :, :T], values[:n, :, :T], attn_mask=bias)
        x = x + block.attn.out(heard.transpose(1, 2).flatten(2))
        x = x + block.ffn(block.norm2(x))
    cache.length[:n] += 1
    logits: Tensor = model.lm_head(model.norm(x[:, 0]))
    return logits


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3C) -> queries, keys and values, each (B, H, T, D)."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, heads, C3 // 3 // heads).permute(2, 0, 3, 1, 4)
    return q, k, v


class Mind(Protocol):
    """What reads, and remembers for the replies in its slots. `at_once`: tokens of prompts it reads between two steps
    without keeping those who speak waiting."""

    at_once: int

    def prefill(self, first_slot: int, prompts: list[list[int]]) -> Tensor:
        """Read whole prompts into the slots from `first_slot` on. Returns the logits after each, (len(prompts), V)."""

    def decode(self, ids: list[int]) -> Tensor:
        """One step: `ids` are the newest tokens of slots 0 to n-1. Returns the logits for the next ones, (n, V)."""

    def move(self, source: int, target: int) -> None:
        """Move a reply to another slot."""

    def choose(
        self, logits: Tensor, mask: Tensor, rows: list[int], settings: list[Sampling], draws: list[float]
    ) -> list[int]:
        """The next token of each row of `logits` + `mask`[rows], as the function `choose` says."""


class TorchMind:
    """`prefill` and `decode` above, in the model's own precision, on any device."""

    at_once = 160

    def __init__(self, model: GuppyLM, slots: int) -> None:
        self.model = model
        self.device = model.tok_emb.weight.device
        self.cache = Cache(model, max(slots, LEAST_ROWS))
        self.lengths = [0] * slots  # what cache.length holds, without asking the device

    def prefill(self, first_slot: int, prompts: list[list[int]]) -> Tensor:
        lengths = [len(ids) for ids in prompts]
        slots = list(range(first_slot, first_slot + len(prompts)))
        self.lengths[first_slot : first_slot + len(prompts)] = lengths
        T = self._whole_blocks(max(lengths))
        ids = [[*ids, *[0] * (T - len(ids))] for ids in prompts]
        return prefill(self.model, self.cache, *(torch.tensor(t, device=self.device) for t in (slots, ids, lengths)))

    def decode(self, ids: list[int]) -> Tensor:
        n = len(ids)
        T = self._whole_blocks(max(self.lengths[:n]) + 1)
        self.lengths[:n] = [length + 1 for length in self.lengths[:n]]
        newest = torch.tensor([*ids, *[0] * (LEAST_ROWS - n)], device=self.device)
        return decode(self.model, self.cache, newest, T)[:n]

    def _whole_blocks(self, positions: int) -> int:
        """So many positions that no sum over them ends in the middle of a block, where its order would change."""
        return min(-(-positions // BLOCK) * BLOCK, self.model.config.max_position_embeddings)

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self.lengths[target] = self.lengths[source]

    def choose(
        self, logits: Tensor, mask: Tensor, rows: list[int], settings: list[Sampling], draws: list[float]
    ) -> list[int]:
        return choose(logits.float() + mask[torch.tensor(rows, device=self.device)], settings, draws)


class CudaMind(TorchMind):
    """The same on a GPU. Both calls are recorded once, as CUDA graphs, and replayed: one launch instead of a hundred,
    always of one shape. (So small a model takes a GPU no longer for all slots than for one.)

    Written with care and never run: the engine before this one ran on a GPU, these graphs have not yet."""

    PROMPTS = 16  # read at a time
    at_once = 2048

    def __init__(self, model: GuppyLM, slots: int) -> None:
        super().__init__(model, slots)
        self.window = model.config.max_position_embeddings
        # A prompt fewer than PROMPTS is read into a slot that nobody has.
        self.nobody = max(slots, LEAST_ROWS)
        self.cache = Cache(model, self.nobody + 1)
        self._newest = torch.zeros(self.nobody, dtype=torch.long, device=self.device)
        self._slots = torch.full((self.PROMPTS,), self.nobody, device=self.device)
        self._ids = torch.zeros(self.PROMPTS, self.window, dtype=torch.long, device=self.device)
        self._lengths = torch.ones(self.PROMPTS, dtype=torch.long, device=self.device)
        self._decode = _record(lambda: decode(model, self.cache, self._newest, self.window))
        self._prefill = _record(lambda: prefill(model, self.cache, self._slots, self._ids, self._lengths))

    def prefill(self, first_slot: int, prompts: list[list[int]]) -> Tensor:
        lengths = [len(ids) for ids in prompts]
        self.lengths[first_slot : first_slot + len(prompts)] = lengths
        logits = []
        for begin in range(0, len(prompts), self.PROMPTS):
            some = prompts[begin : begin + self.PROMPTS]
            spare = self.PROMPTS - len(some)
            first = first_slot + begin
            self._slots.copy_(torch.tensor([*range(first, first + len(some)), *[self.nobody] * spare]))
            self._ids.copy_(torch.tensor([*([*ids, *[0] * (self.window - len(ids))] for ids in some),
                                          *[[0] * self.window] * spare]))  # fmt: skip
            self._lengths.copy_(torch.tensor([*lengths[begin : begin + self.PROMPTS], *[1] * spare]))
            logits.append(self._prefill()[: len(some)].clone())
        return torch.cat(logits)

    def decode(self, ids: list[int]) -> Tensor:
        n = len(ids)
        self.lengths[:n] = [length + 1 for length in self.lengths[:n]]
        self._newest[:n].copy_(torch.tensor(ids))
        return self._decode()[:n]


def _record(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call as a CUDA graph: its kernels as they are launched now, on the same memory each time."""
    with torch.inference_mode():
        warming = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warming):
            call()  # what is set up at the first call must not be recorded
        torch.cuda.current_stream().wait_stream(warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def choose(logits: Tensor, settings: list[Sampling], draws: list[float]) -> list[int]:
    """The next token of each row of `logits` (n, V); `draws` are its random numbers in [0, 1).

    The tokens stand in a row from likeliest to least likely, each as wide as its probability; the draw points at one.
    """
    V, device = logits.shape[-1], logits.device
    ks = [s.most(V) for s in settings]
    numbers = [(s.divisor, s.top_p, s.min_p, draw) for s, draw in zip(settings, draws, strict=True)]
    exact = torch.float32 if device.type == "mps" else torch.float64
    top_k = torch.tensor(ks, device=device)[:, None]
    temperature, top_p, min_p, draw = torch.tensor(numbers, dtype=exact, device=device).T[:, :, None]
    # Equals, which are common in bf16, stand in the order of their ids: topk's own order would change with k.
    ids = torch.arange(V, device=device)
    values, tokens = (logits.to(exact) - ids * 2**-40).topk(max(ks), dim=-1)  # sorted
    p = ((values - values[:, :1]) / temperature).exp()  # the likeliest is 1 wide
    p = p * (ids[: max(ks)] < top_k) * (p >= min_p)
    # Running sums, and nothing else: they do not change with how many tokens the company asks for.
    ends = p.cumsum(-1)
    p = p * (ends - p < top_p * ends[:, -1:])
    ends = p.cumsum(-1)
    index = (ends <= draw * ends[:, -1:]).sum(-1)
    # Rounding may point behind the last allowed token.
    index = torch.minimum(index, (p > 0).sum(-1) - 1)
    chosen: list[int] = tokens.gather(1, index[:, None])[:, 0].tolist()
    return chosen


def share(number: int, among: int) -> list[int]:
    """`number` dealt out as evenly as can be, nothing to nobody: share(5, 2) is [3, 2], share(1, 2) is [1]."""
    among = min(number, among)
    return [number // among + (index < number % among) for index in range(among)]


def best_precision(model: GuppyLM, device: torch.device) -> tuple[Precision, str]:
    """What the benchmark shows to be the fastest here (benchmarks/README.md), and why."""
    if device.type == "cuda":
        return "bf16", "the fastest on a GPU"
    if device.type != "cpu":
        return "fp32", "works everywhere"
    try:
        return "int8", "with" + ("" if native.has_tiles() else "out") + " this processor's tiles (AMX)"
    except native.Unavailable as error:
        return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32", f"no int8: {error}"


class Engine:
    """A fish that is ready to talk. Make one with `Engine.load`; `await engine.aclose()` when done."""

    def __init__(self, model: GuppyLM, chat: ChatFormat, minds: list[Mind], max_batch: int, max_waiting: int) -> None:
        """minds: who reads, each in a thread of its own, with as many slots as `share` gives it of `max_batch`."""
        self.model, self.chat = model, chat
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._masks = self._make_masks()
        self._waiting: deque[_Request] = deque()
        self._wake = threading.Condition()
        self._closing = False
        shares = share(max_batch, len(minds))
        self._voices = [_Voice(self, mind, slots) for mind, slots in zip(minds, shares, strict=True)]
        for voice in self._voices:
            voice.thread.start()

    @classmethod
    def load(
        cls,
        model: str | Path = checkpoint.DEFAULT_MODEL,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        max_batch: int = 32,
        max_waiting: int = 256,
    ) -> Engine:
        """Load a model folder by name or path. Raises checkpoint.ModelError, and ValueError for a device or precision
        that this machine does not have.

        max_batch: how many replies are under way at once. max_waiting: how many more may wait; beyond, EngineBusy.
        """
        return cls.of(
            checkpoint.load(model), device=device, precision=precision, max_batch=max_batch, max_waiting=max_waiting
        )

    @classmethod
    def of(
        cls,
        loaded: checkpoint.Checkpoint,
        *,
        device: str = "auto",
        precision: Precision = "auto",
        max_batch: int = 32,
        max_waiting: int = 256,
    ) -> Engine:
        """As `load`, of a model that is loaded already; it is the engine's from now on."""
        if max_batch < 1 or max_waiting < 0:
            raise ValueError("max_batch must be at least 1 and max_waiting at least 0.")
        if precision not in get_args(Precision):
            raise ValueError(f"precision is '{precision}'; choose {', '.join(get_args(Precision))}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            target = torch.device(device)
            torch.zeros(1, device=target).item()
        except (RuntimeError, AssertionError):
            raise ValueError(f"There is no device '{device}' here; use 'cpu' or 'auto'.") from None
        reason = "as asked"
        if precision == "auto":
            precision, reason = best_precision(loaded.model, target)
        # On a CPU a core each: two cores at two things get more done than two that wait for each other.
        shares = share(max_batch, (os.cpu_count() or 1) if target.type == "cpu" else 1)
        minds: list[Mind]
        if precision == "int8":
            if target.type != "cpu":
                raise ValueError(f"int8 is for the CPU; on '{device}' use bf16 or fp32.")
            try:
                fish = native.NativeModel(loaded.model)
            except native.Unavailable as error:
                raise ValueError(f"int8 does not work on this machine: {error}. Use auto, fp32 or bf16.") from None
            minds = [native.NativeMind(fish, slots) for slots in shares]
        else:
            fish_of_torch = loaded.model.to(
                device=target, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
            )
            minds = [(CudaMind if target.type == "cuda" else TorchMind)(fish_of_torch, slots) for slots in shares]
        log.info("engine ready: %s on %s in %s (%s)", loaded.path.name, target, precision, reason)
        return cls(loaded.model, loaded.format, minds, max_batch, max_waiting)

    # -- what may come next -------------------------------------------------------------------------------

    def _make_masks(self) -> Tensor:
        """One row of 0 and NEVER for each state a reply can be in (_FIRST_WORD, ...)."""
        chat, V = self.chat, self.model.config.vocab_size
        decodable = chat.tokenizer.get_vocab(with_added_tokens=False).values()
        added = set(chat.tokenizer.get_added_tokens_decoder())
        words = [number for number in decodable if number not in added and number < V]
        states: list[list[int]] = [
            words,  # the first word: a reply is never empty
            [*words, IM_END],
            list(chat.topics),
            *(list(intents) for intents in chat.intents.values()),
        ]
        masks = torch.full((len(states), V), NEVER)
        for row, allowed in zip(masks, states, strict=True):
            row[torch.tensor(allowed, dtype=torch.long)] = 0.0
        self._intent_mask = {topic: 3 + index for index, topic in enumerate(chat.intents)}
        return masks.to(self.model.tok_emb.weight.device)

    # -- asking -------------------------------------------------------------------------------------------

    async def ask(self, prompt: str, sampling: Sampling = Sampling(), *, seed: int | None = None) -> Completion:
        """The reply to one prompt. Cancel the awaiting task to cancel the reply. Raises EngineBusy."""
        request = self._submit(prompt, sampling, seed, None)
        try:
            return await asyncio.wrap_future(request.done)
        finally:
            self._abandon(request)  # too late to matter when it is done

    async def stream(
        self, prompt: str, sampling: Sampling = Sampling(), *, seed: int | None = None
    ) -> AsyncIterator[str]:
        """The reply piece by piece, as it is spoken; the pieces joined are `ask`'s text. A character is never split."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str] = asyncio.Queue()
        request = self._submit(
            prompt, sampling, seed, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        )
        done = asyncio.wrap_future(request.done)
        done.add_done_callback(lambda _: pieces.put_nowait(""))
        try:
            while piece := await pieces.get():
                yield piece
            await done
        finally:
            self._abandon(request)

    def _submit(
        self, prompt: str, sampling: Sampling, seed: int | None, on_token: Callable[[str], object] | None
    ) -> _Request:
        seed = random.getrandbits(63) if seed is None else seed
        request = _Request(self.chat.encode_prompt(prompt), sampling, seed, Future(), on_token)
        room = self.chat.window - len(request.prompt.ids)
        thought = 2 if self.chat.thoughts else 0
        request.limit = min(room, thought + (sampling.max_new_tokens or room))
        request.mask = _TOPIC if self.chat.thoughts else _FIRST_WORD
        with self._wake:
            if self._closing:
                raise RuntimeError("The engine is closed.")
            if len(self._waiting) >= self.max_waiting + max(0, self.max_batch - self.running):
                raise EngineBusy(f"{len(self._waiting)} requests are waiting already.")
            self._waiting.append(request)
            self._wake.notify()
        return request

    def _abandon(self, request: _Request) -> None:
        """Nobody waits for this reply any more: its place in the queue is free at once, its slot after this token."""
        request.cancelled = True
        with self._wake:
            if request in self._waiting:
                self._waiting.remove(request)

    @property
    def running(self) -> int:
        """How many replies are under way."""
        return sum(len(voice.running) for voice in self._voices)

    @property
    def waiting(self) -> int:
        """How many prompts wait for a slot."""
        return len(self._waiting)

    @property
    def steps(self) -> int:
        """How often anything was read since the start: whoever watches sees whether the engine goes on."""
        return sum(voice.steps for voice in self._voices)

    async def aclose(self) -> None:
        """Finish what is under way and end the engine's threads."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for voice in self._voices:
            await asyncio.to_thread(voice.thread.join)

    # -- between the threads ------------------------------------------------------------------------------

    def _next(self, voice: _Voice) -> list[_Request]:
        """Newcomers for free slots of `voice`: its share of all there are, a bounded number of tokens. Waits if there
        is nothing to do."""
        newcomers: list[_Request] = []
        with self._wake:
            while not (self._waiting or voice.running or self._closing):
                self._wake.wait()
            fair = -(-(self.running + len(self._waiting)) // len(self._voices))
            room = min(fair, voice.slots) - len(voice.running)
            tokens = 0
            while self._waiting and len(newcomers) < room:
                tokens += len(self._waiting[0].prompt.ids)
                if newcomers and tokens > voice.mind.at_once:
                    break
                newcomers.append(self._waiting.popleft())
            voice.running += newcomers
        return newcomers


class _Voice:
    """A thread that speaks: a mind and the replies in its slots."""

    def __init__(self, engine: Engine, mind: Mind, slots: int) -> None:
        self.engine, self.mind, self.slots = engine, mind, slots
        self.chat = engine.chat
        self.steps = 0
        self.running: list[_Request] = []  # by slot
        self.thread = threading.Thread(target=self._work, name="guppy-engine", daemon=True)

    def _work(self) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while True:
                self._drop_cancelled()
                newcomers = self.engine._next(self)
                if not self.running:
                    if self.engine._closing:
                        return
                    continue
                try:
                    if newcomers:
                        first_slot = len(self.running) - len(newcomers)
                        self._advance(self.mind.prefill(first_slot, [n.prompt.ids for n in newcomers]), first_slot)
                    if self.running:
                        self._advance(self.mind.decode([request.ids[-1] for request in self.running]), 0)
                except Exception as error:  # whoever waits must hear of it; the next request starts afresh
                    log.exception("the engine stumbled")
                    for request in self.running:
                        _fail(request, error)
                    self.running.clear()

    def _drop_cancelled(self) -> None:
        for slot in reversed(range(len(self.running))):
            if self.running[slot].cancelled:
                self._leave(slot)

    def _advance(self, logits: Tensor, first_slot: int) -> None:
        """Choose the next token of the replies from `first_slot` on, and let those leave that have ended."""
        requests = self.running[first_slot:]
        masks = [request.mask for request in requests]
        settings = [_GREEDY if request.mask >= _TOPIC else request.sampling for request in requests]
        draws = [0.0 if s.temperature == 0 else r.rng.random() for r, s in zip(requests, settings, strict=True)]
        tokens = self.mind.choose(logits, self.engine._masks, masks, settings, draws)
        self.steps += 1
        for slot in reversed(range(first_slot, first_slot + len(requests))):
            request = self.running[slot]
            try:
                completion = self._completion(request) if self._take(request, tokens[slot - first_slot]) else None
            except Exception as error:  # the trouble of one (a reader gone in the middle of a stream), not of all
                self._leave(slot)
                _fail(request, error)
                continue
            if completion:
                self._leave(slot)
                _finish(request, completion)

    def _take(self, request: _Request, token: int) -> bool:
        """Add a token to a reply. Returns whether the reply has ended."""
        if token == IM_END:
            return True
        request.ids.append(token)
        if request.mask == _TOPIC:
            request.topic, request.mask = token, self.engine._intent_mask[token]
        elif request.mask > _TOPIC:
            request.intent, request.mask = token, _FIRST_WORD
        else:
            if request.mask == _FIRST_WORD:
                request.first_word = time.perf_counter() - request.asked
            request.mask = _NEXT_WORD
            if request.on_token:  # else it is decoded once, at the end
                self._show(request, self._text(request))
        return len(request.ids) >= request.limit

    def _leave(self, slot: int) -> None:
        """Free a slot; the last reply moves into it."""
        last = len(self.running) - 1
        if slot != last:
            self.mind.move(last, slot)
            self.running[slot] = self.running[last]
        self.running.pop()

    def _text(self, request: _Request) -> str:
        """The words so far. An unfinished character or a space at the end waits for what comes next."""
        words = request.ids[2:] if self.chat.thoughts else request.ids
        return self.chat.decode(words).lstrip().rstrip("\ufffd").rstrip()

    def _show(self, request: _Request, text: str) -> None:
        """Hand on what is new of `text`."""
        if request.on_token and len(text) > len(request.shown):
            request.on_token(text[len(request.shown) :])
            request.shown = text

    def _completion(self, request: _Request) -> Completion:
        text = self._text(request) or SPEECHLESS
        self._show(request, text)
        return Completion(
            text=text,
            prompt_cut=request.prompt.cut,
            tokens=len(request.ids),
            topic=self.chat.topics[request.topic] if request.topic is not None else None,
            intent=self.chat.intents[request.topic][request.intent]
            if request.topic is not None and request.intent is not None
            else None,
            first_word=request.first_word,
        )


_GREEDY = Sampling(temperature=0.0)


def _finish(request: _Request, completion: Completion) -> None:
    if request.done.set_running_or_notify_cancel():
        request.done.set_result(completion)


def _fail(request: _Request, error: Exception) -> None:
    if request.done.set_running_or_notify_cancel():
        request.done.set_exception(error)
