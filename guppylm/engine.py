"""The engine: prompts in, replies out, as many at once as there are.

How a reply comes to be, top to bottom in this file:

    prefill   the prompt goes through the model once; what each layer needs of it later (keys, values) is kept
    decode    one token a step for every reply under way, all in one batch, looking back into the cache
    sampling  from the last logits to the next token: first the thought (greedily), then the words (by chance)

Replies join and leave between steps (continuous batching): a short one never waits for a long one, and a newcomer
never waits for a batch to end. A thread of the engine's own does the arithmetic; `ask` and `stream` are for asyncio.

Everything random about a reply comes from its own seed, so it does not depend on what else is in the batch.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from guppylm import checkpoint
from guppylm.conversation import IM_END, ChatFormat, Prompt
from guppylm.model import Block, GuppyLM

log = logging.getLogger(__name__)

# Newcomers' prompts are read at most this many tokens at a time, so that those already speaking go on.
PREFILL_TOKENS = 160
# What is said when a model has no words at all (an untrained one: a trained fish always finds some).
SPEECHLESS = "blub."


class EngineBusy(Exception):
    """More requests are waiting than `max_waiting`; this one was refused at once."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next word is chosen. Each setting is checked; ValueError says what is allowed.

    temperature: 0 always takes the likeliest token; 1 follows the model's own probabilities.
    top_k: only the k likeliest tokens; 0 for all.
    top_p: only the likeliest tokens that together reach this probability; 1 for all.
    min_p: only tokens at least this probable relative to the likeliest; 0 for all.
    max_new_tokens: a reply ends after this many tokens at the latest; None for what the window holds.
    """

    temperature: float = 0.7
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


@dataclass(frozen=True)
class Completion:
    """A reply. `topic` is what Guppy thought it is about (None if the model does not think), `prompt_cut` whether the
    prompt was too long for the window, `tokens` how many were generated, thoughts included."""

    text: str
    prompt_cut: bool
    tokens: int
    topic: str | None = None
    intent: str | None = None


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

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)


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
        end = int(self.length[source])
        self.keys[:, target, :, :end] = self.keys[:, source, :, :end]
        self.values[:, target, :, :end] = self.values[:, source, :, :end]
        self.length[target] = end


def prefill(model: GuppyLM, cache: Cache, first_slot: int, prompts: list[list[int]]) -> Tensor:
    """Read whole prompts into the slots from `first_slot` on. Returns the logits after each, (len(prompts), V)."""
    device = model.tok_emb.weight.device
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    T = max(len(ids) for ids in prompts)
    ids = torch.tensor([[*ids, *[0] * (T - len(ids))] for ids in prompts], device=device)
    slots = slice(first_slot, first_slot + len(prompts))
    # Padding stands behind the prompt, where no real position looks; the next token overwrites it in the cache.
    x = model.tok_emb(ids) + model.pos_emb.weight[:T]
    for layer, block in enumerate(cast(Iterable[Block], model.blocks)):
        q, k, v = _split(block.attn.qkv(block.norm1(x)), block.attn.heads)
        cache.keys[layer, slots, :, :T], cache.values[layer, slots, :, :T] = k, v
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.out(heard.transpose(1, 2).flatten(2))
        x = x + block.ffn(block.norm2(x))
    cache.length[slots] = lengths
    last = x[torch.arange(len(prompts), device=device), lengths - 1]
    logits: Tensor = model.lm_head(model.norm(last))
    return logits


def decode(model: GuppyLM, cache: Cache, ids: Tensor) -> Tensor:
    """One step: `ids` (n,) are the newest tokens of slots 0 to n-1. Returns the logits for the next ones, (n, V)."""
    n = len(ids)
    positions = cache.length[:n]
    rows = torch.arange(n, device=ids.device)
    T = int(positions.max()) + 1
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


def choose(logits: Tensor, settings: list[Sampling], draws: list[float]) -> list[int]:
    """The next token of each row of `logits` (n, V); `draws` are its random numbers in [0, 1).

    The tokens stand in a row from likeliest to least likely, each as wide as its probability; the draw points at one.
    """
    if all(s.temperature == 0 for s in settings):
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    V = logits.shape[-1]
    # A k of 0 is all of them; greedily, only the first counts.
    ks = [1 if s.temperature == 0 else min(s.top_k or V, V) for s in settings]
    device = logits.device
    values, tokens = logits.float().topk(max(ks), dim=-1)  # sorted
    temperature = torch.tensor([max(s.temperature, 1e-6) for s in settings], device=device)
    top_k = torch.tensor(ks, device=device)
    top_p = torch.tensor([s.top_p for s in settings], device=device)
    min_p = torch.tensor([s.min_p for s in settings], device=device)
    rank = torch.arange(values.shape[-1], device=device)
    p = ((values - values[:, :1]) / temperature[:, None]).softmax(-1)
    p = p * (rank < top_k[:, None])
    before = p.cumsum(-1) - p  # the probability of all likelier tokens
    p = p * (before < top_p[:, None] * p.sum(-1, keepdim=True)) * (p >= min_p[:, None] * p[:, :1])
    ends = p.cumsum(-1)
    pointed = torch.tensor(draws, device=device)[:, None] * ends[:, -1:]
    index = (ends <= pointed).sum(-1).clamp(max=values.shape[-1] - 1)
    # Rounding may point behind the last allowed token.
    index = torch.minimum(index, (p > 0).sum(-1) - 1)
    chosen: list[int] = tokens.gather(1, index[:, None])[:, 0].tolist()
    return chosen


class Engine:
    """A fish that is ready to talk. Make one with `Engine.load`; `await engine.aclose()` when done.

    max_batch: how many replies are under way at once. max_waiting: how many more may wait; beyond, EngineBusy.
    """

    def __init__(self, model: GuppyLM, chat: ChatFormat, *, max_batch: int = 32, max_waiting: int = 256) -> None:
        if max_batch < 1 or max_waiting < 0:
            raise ValueError("max_batch must be at least 1 and max_waiting at least 0.")
        self.model, self.chat = model, chat
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.steps = 0
        self._cache = Cache(model, max_batch)
        self._masks = self._make_masks()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="guppy-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        model: str | Path = checkpoint.DEFAULT_MODEL,
        *,
        device: str = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        max_batch: int = 32,
        max_waiting: int = 256,
    ) -> Engine:
        """Load a model folder by name or path. Raises checkpoint.ModelError, and ValueError for a device or precision
        that this machine does not have."""
        loaded = checkpoint.load(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            target = torch.device(device)
            torch.zeros(1, device=target).item()
        except (RuntimeError, AssertionError):
            raise ValueError(f"There is no device '{device}' here; use 'cpu' or 'auto'.") from None
        if precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision is '{precision}'; choose auto, fp32 or bf16.")
        if precision == "auto":
            precision = "bf16" if target.type == "cuda" else "fp32"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        fish = loaded.model.to(device=target, dtype=dtype)
        log.info("engine ready: %s on %s in %s", loaded.path.name, target, precision)
        return cls(fish, loaded.format, max_batch=max_batch, max_waiting=max_waiting)

    # -- what may come next -------------------------------------------------------------------------------

    def _make_masks(self) -> Tensor:
        """One row of 0 and -inf for each state a reply can be in; see _after."""
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
        masks = torch.full((len(states), V), float("-inf"))
        for row, allowed in zip(masks, states, strict=True):
            row[torch.tensor(allowed, dtype=torch.long)] = 0.0
        self._intent_mask = {topic: 3 + index for index, topic in enumerate(chat.intents)}
        return masks.to(self.model.tok_emb.weight.device)

    _FIRST_WORD, _NEXT_WORD, _TOPIC = 0, 1, 2

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
        request.mask = self._TOPIC if self.chat.thoughts else self._FIRST_WORD
        with self._wake:
            if self._closing:
                raise RuntimeError("The engine is closed.")
            if len(self._waiting) >= self.max_waiting + max(0, self.max_batch - len(self._running)):
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
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many prompts wait for a slot."""
        return len(self._waiting)

    async def aclose(self) -> None:
        """Finish what is under way and end the engine's thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    # -- the engine's thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._waiting or self._running or self._closing):
                        self._wake.wait()
                    if self._closing and not self._waiting and not self._running:
                        return
                try:
                    self._drop_cancelled()
                    self._admit()
                    if self._running:
                        self._step()
                except Exception as error:  # whoever waits must hear of it; the next request starts afresh
                    log.exception("the engine stumbled")
                    for request in self._running:
                        _fail(request, error)
                    self._running.clear()

    def _drop_cancelled(self) -> None:
        for slot in reversed(range(len(self._running))):
            if self._running[slot].cancelled:
                self._leave(slot)

    def _admit(self) -> None:
        """Read the prompts of newcomers into free slots, a bounded number of tokens a step."""
        newcomers: list[_Request] = []
        budget = PREFILL_TOKENS
        with self._wake:
            while self._waiting and len(self._running) + len(newcomers) < self.max_batch:
                request = self._waiting[0]
                budget -= len(request.prompt.ids)
                if newcomers and budget < 0:
                    break
                newcomers.append(self._waiting.popleft())
        if not newcomers:
            return
        first_slot = len(self._running)
        self._running += newcomers
        logits = prefill(self.model, self._cache, first_slot, [request.prompt.ids for request in newcomers])
        self._advance(logits, first_slot)

    def _step(self) -> None:
        """One token for every reply under way."""
        newest = torch.tensor([request.ids[-1] for request in self._running], device=self._masks.device)
        self._advance(decode(self.model, self._cache, newest), 0)

    def _advance(self, logits: Tensor, first_slot: int) -> None:
        """Choose the next token of the replies from `first_slot` on, and let those leave that have ended."""
        requests = self._running[first_slot:]
        masks = torch.tensor([request.mask for request in requests], device=logits.device)
        thinking = [request.mask >= self._TOPIC for request in requests]
        settings = [_GREEDY if thinks else r.sampling for r, thinks in zip(requests, thinking, strict=True)]
        draws = [0.0 if s.temperature == 0 else r.rng.random() for r, s in zip(requests, settings, strict=True)]
        tokens = choose(logits.float() + self._masks[masks], settings, draws)
        self.steps += 1
        for slot in reversed(range(first_slot, first_slot + len(requests))):
            request = self._running[slot]
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
        if request.mask == self._TOPIC:
            request.topic, request.mask = token, self._intent_mask[token]
        elif request.mask > self._TOPIC:
            request.intent, request.mask = token, self._FIRST_WORD
        else:
            request.mask = self._NEXT_WORD
            if request.on_token:  # else it is decoded once, at the end
                self._show(request, self._text(request))
        return len(request.ids) >= request.limit

    def _leave(self, slot: int) -> None:
        """Free a slot; the last reply moves into it."""
        last = len(self._running) - 1
        if slot != last:
            self._cache.move(last, slot)
            self._running[slot] = self._running[last]
        self._running.pop()

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
        )


_GREEDY = Sampling(temperature=0.0)


def _finish(request: _Request, completion: Completion) -> None:
    if request.done.set_running_or_notify_cancel():
        request.done.set_result(completion)


def _fail(request: _Request, error: Exception) -> None:
    if request.done.set_running_or_notify_cancel():
        request.done.set_exception(error)
