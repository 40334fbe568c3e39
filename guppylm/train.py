"""The training loop: conversations in, a model folder out.

    data set -> token rows -> batches of similar length -> loss -> Muon and AdamW -> a model folder

Four things differ from the textbook, and none is the model:

- A thought comes before each reply (conversation.py), and its two tokens count more than the others. A small model
  learns to speak long before it learns to listen; the thought makes listening pay from the first step.
- Guesses: while he is still being spoken to, he guesses the topic after every word. So a word is tied to its topic
  where it stands, instead of only through the one position at the end that has to find it.
- Listening lessons: a share of the rows ends with the thought. They cost half and teach the harder half.
- Muon (muon.py) steps the matrices: what is rare is learnt beside what is frequent.

A run is a folder: `checkpoint.pt` (everything needed to go on, written every 30 seconds), `log.jsonl` (a line every
few steps), and the model folder's own files at the end. Training continued from a checkpoint on a CPU takes the same
steps, bit for bit, as training that was never interrupted.

Several processes (`torchrun`) share each batch; together they take the steps that one process would take.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from guppylm import checkpoint
from guppylm.checkpoint import Checkpoint, ModelError
from guppylm.conversation import IM_END, ChatFormat
from guppylm.datagen.dataset import Conversation
from guppylm.model import GuppyLM, ModelConfig
from guppylm.muon import Muon
from guppylm.recipe import Recipe, Train
from guppylm.tokenizer import train_tokenizer

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
SECONDS_BETWEEN_CHECKPOINTS = 30.0
STEPS_BETWEEN_LOG_LINES = 10
# Rows of similar length are sought among this many at a time.
POOL = 8192


class TrainError(Exception):
    """Training cannot go on. The message says why and what to do."""


@dataclass(frozen=True)
class Progress:
    """What the loop tells after a step. Losses are in nats a token; `examined` is the share of held-out prompts whose
    topic the fish names, when it was measured at this step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    examined: float | None = None


class Rows:
    """A data set as token rows: ids (N, longest) and topic (N,), the topic's id, resident on the device; where thought
    and reply begin and how long each row is, (N,), on the host, which plans with them. `prompt`: where all prompts
    begin."""

    def __init__(self, conversations: list[Conversation], chat: ChatFormat, device: torch.device) -> None:
        # Arrays of two bytes a token: as lists, a million conversations would take gigabytes.
        encoded = [
            (array("h", tokens), thought, reply)
            for tokens, thought, reply in (chat.encode(c.prompt, c.reply, c.topic, c.intent) for c in conversations)
        ]
        longest = max((len(ids) for ids, _, _ in encoded), default=0)
        ids = torch.zeros(len(encoded), longest, dtype=torch.int16)
        for row, (tokens, _, _) in enumerate(encoded):
            ids[row, : len(tokens)] = torch.frombuffer(tokens, dtype=torch.int16)
        self.ids = ids.to(device)
        self.length = torch.tensor([len(ids) for ids, _, _ in encoded])
        self.thought = torch.tensor([thought for _, thought, _ in encoded])
        self.reply = torch.tensor([reply for _, _, reply in encoded])
        self.prompt = len(chat.head)
        topics = {topic: number for number, topic in chat.topics.items()}
        self.topic = torch.tensor([topics[c.topic] for c in conversations], device=device)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together, and how many positions of them. When `listening`, they end with the
    thought."""

    rows: list[int]
    positions: int
    listening: bool


def plan(rows: Rows, recipe: Train, listening_share: float, epoch: int) -> list[Batch]:
    """The batches of one epoch: rows of similar length together, in random order; `listening_share` of the rows end
    with the thought. When all do, only short ones are taken: among few words it is easier to find the one that counts.
    Depends on nothing but the data and these arguments, so a continued run finds its place again."""
    rng = random.Random(f"{recipe.seed}/{listening_share}/{epoch}")
    most = recipe.short if listening_share == 1 else rows.ids.shape[1]
    thought, length = rows.thought.tolist(), rows.length.tolist()
    order = [row for row, positions in enumerate(thought) if positions <= most] or list(range(len(rows)))
    rng.shuffle(order)
    batches: list[Batch] = []
    for begin in range(0, len(order), POOL):
        listening, speaking = [], []
        for row in order[begin : begin + POOL]:
            if rng.random() < listening_share:
                # The last input is the topic; the intent after it is only predicted.
                listening.append((min(thought[row] + 1, length[row] - 1), row))
            else:
                speaking.append((length[row] - 1, row))
        for group in (listening, speaking):
            group.sort()
            while group:
                positions = group[-1][0]
                fits = max(1, recipe.batch_tokens // positions)
                batches.append(Batch([row for _, row in group[-fits:]], positions, group is listening))
                del group[-fits:]
    rng.shuffle(batches)
    return batches


def batch_loss(model: nn.Module, rows: Rows, batch: Batch, recipe: Train, share: slice = slice(None)) -> Tensor:
    """The weighted loss of a batch in nats a token, over the `share` of its rows that is this process's.

    The denominator is the whole batch's weight: the shares of all processes add up to the batch's loss. What counts is
    found on the host, so that it never waits for the device.
    """
    device, index = rows.ids.device, torch.tensor(batch.rows)
    thought, reply, length = rows.thought[index, None], rows.reply[index, None], rows.length[index, None]
    at = torch.arange(1, batch.positions + 1)  # the position each target stands at
    # What each position is asked for: the topic (after every word of the prompt, then as the thought itself), the
    # intent, or the next word of the reply.
    asked = (at > rows.prompt) & (at < (reply if batch.listening else length))
    thinking = (at >= thought) & (at < reply)
    weights = torch.where(
        at < thought, recipe.guess_weight, torch.where(thinking, recipe.thought_weight, recipe.reply_weight)
    )
    weights = weights * asked
    total = weights.sum().item()
    weights = weights[share].flatten()
    places = [
        ((weights > 0) & kind[share].flatten()).nonzero()[:, 0]
        for kind in (at >= reply, (at <= thought) & (at < reply), thinking & (at > thought))
    ]
    ids = rows.ids[index[share].to(device), : batch.positions + 1].long()
    guessed = (at < thought)[share].to(device)
    targets = torch.where(guessed, rows.topic[index[share].to(device), None], ids[:, 1:])
    losses = model(ids[:, :-1], targets, *(some.to(device) for some in places))
    loss: Tensor = (losses * weights[torch.cat(places)].to(device)).sum() / total
    return loss


class Losses(nn.Module):
    """The model as the loop calls it: ids in, the loss of each token that counts out.

    A thought is chosen among thoughts (topics first, then the topic's intents), as the engine does it, and a word
    among all tokens. Were a thought chosen among all tokens, each step would push every word's embedding away from it,
    all in one direction, and with the embeddings tied, the words coming in would drown in what they have in common:
    the model heard nothing for the first thousand steps.
    """

    def __init__(self, model: GuppyLM, chat: ChatFormat) -> None:
        super().__init__()
        self.model = model
        topics = list(chat.topics)
        intents = [intent for some in chat.intents.values() for intent in some]
        owners = [topic for topic, some in chat.intents.items() for _ in some]
        for name, ids in (("topics", topics), ("intents", intents), ("owners", owners)):
            numbers = torch.tensor(ids, dtype=torch.long, device=model.tok_emb.weight.device)
            self.register_buffer(name, numbers, persistent=False)
        self.topics: Tensor
        self.intents: Tensor  # the intents of one topic compete with each other,
        self.owners: Tensor  # the topic of each

    def forward(self, ids: Tensor, targets: Tensor, words: Tensor, topics: Tensor, intents: Tensor) -> Tensor:
        """ids and targets (B, T); `words`, `topics` and `intents` are the places in B x T of the targets that count.
        Returns their losses in this order."""
        hidden, targets = self.model.hidden(ids).flatten(0, 1), targets.flatten()
        # Only positions that count pass through the head, the widest matrix of all.
        losses = [F.cross_entropy(self.model.lm_head(hidden[words]).float(), targets[words], reduction="none")]
        embedding = self.model.tok_emb.weight
        # The ids of topics follow one another, and so do those of intents.
        logits = hidden[topics] @ embedding[self.topics].T
        losses.append(F.cross_entropy(logits.float(), targets[topics] - self.topics[0], reduction="none"))
        chosen = targets[intents] - self.intents[0]
        rivals = self.owners[chosen, None] == self.owners
        logits = (hidden[intents] @ embedding[self.intents].T).float().masked_fill(~rivals, float("-inf"))
        losses.append(F.cross_entropy(logits, chosen, reduction="none"))
        return torch.cat(losses)


def schedule(step: int, recipe: Train) -> float:
    """The share of the full rates at a step: warm up, stay, fall to zero (a trapezoid). `step` counts from 0."""
    warmup, decay = recipe.warmup * recipe.steps, recipe.decay * recipe.steps
    rise = (step + 1) / warmup if warmup else 1.0
    fall = (recipe.steps - step) / decay if decay else 1.0
    return min(1.0, rise, fall)


def make_optimizers(model: GuppyLM, recipe: Train) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (muon.py), AdamW for the rest: embeddings, norms, biases."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.dim() == 2 and "emb" not in name]
    rest = [p for name, p in named.items() if name not in matrices]
    return [
        Muon(
            [named[name] for name in matrices],
            lr=recipe.matrix_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            dtype=torch.bfloat16 if _has_bf16(model.tok_emb.weight.device) else torch.float32,
        ),
        torch.optim.AdamW(
            rest, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0, fused=True
        ),
    ]


@torch.no_grad()
def topics_heard(model: GuppyLM, rows: Rows, chat: ChatFormat, most: int = 400) -> float:
    """The share of rows (evenly spread, at most `most`) whose topic the model names first."""
    model.eval()
    topics = torch.tensor(list(chat.topics), device=rows.ids.device)
    chosen = sorted(range(0, len(rows), max(1, len(rows) // most)), key=rows.thought.tolist().__getitem__)
    right = 0
    for begin in range(0, len(chosen), 64):
        some = torch.tensor(chosen[begin : begin + 64])
        last, whole = rows.thought[some] - 1, rows.ids[some.to(rows.ids.device)].long()
        hidden = model.hidden(whole[:, : int(last.max()) + 1])
        logits = model.lm_head(hidden[torch.arange(len(some)), last])[:, topics]
        truth = whole[torch.arange(len(some)), last + 1]
        right += int((topics[logits.argmax(-1)] == truth).sum())
    model.train()
    return right / len(chosen)


def make_chat(
    train: list[Conversation], held_out: list[Conversation], recipe: Recipe, start: Checkpoint | None
) -> tuple[Tokenizer, dict[str, list[str]]]:
    """The tokenizer of the training conversations, and the thoughts of all. A fish to start from that has these
    thoughts keeps his own: other tokens would cost him some of what he knows."""
    thoughts: dict[str, list[str]] = {}
    for topic, intent in sorted({(c.topic, c.intent) for c in [*train, *held_out]}):
        thoughts.setdefault(topic, []).append(intent)
    if start and all(set(intents) <= set(start.format.thoughts.get(topic, [])) for topic, intents in thoughts.items()):
        return start.format.tokenizer, start.format.thoughts
    prompts = (c.prompt for c in train)
    replies = (c.reply for c in train)
    try:
        return train_tokenizer(prompts, replies, thoughts, recipe.tokenizer.vocab_size), thoughts
    except ValueError as error:
        raise TrainError(f"tokenizer.{error}") from None


def find_start(recipe: Recipe) -> Checkpoint | None:
    """The fish that the recipe starts from, if any. Raises TrainError when it can't be used."""
    if recipe.train.start_from is None:
        return None
    try:
        start = checkpoint.load(recipe.train.start_from)
    except ModelError as error:
        raise TrainError(f"train.start_from: {error}") from None
    for name, size in recipe.model.model_dump(exclude={"hidden_dropout_prob"}).items():
        if (has := getattr(start.model.config, name)) != size:
            raise TrainError(
                f"train.start_from: {start.path} has {name} {has}, the recipe {size}. Give model.{name} his size, "
                "or start from nothing."
            )
    return start


@torch.no_grad()
def take_over(model: GuppyLM, chat: ChatFormat, start: Checkpoint) -> None:
    """Copy what another fish of the same shape has learnt. Their tokens may differ: one that both have keeps its
    embedding, a word that is new gets the mean of the tokens it was written with before, and a new thought the mean of
    those it stands among (all topics; its topic's intents)."""
    elder = start.format
    intents = {topic: list(elder.intents[number]) for number, topic in elder.topics.items()}
    topics, all_intents = list(elder.topics), list(chain(*intents.values()))
    near = dict.fromkeys(chat.topics, topics)
    for number, topic in chat.topics.items():
        near |= dict.fromkeys(chat.intents[number], intents.get(topic, all_intents))
    state = start.model.state_dict()
    known, embedding = elder.tokenizer.get_vocab(), state["tok_emb.weight"]
    state["tok_emb.weight"] = state["lm_head.weight"] = mine = model.tok_emb.weight.clone()
    for token, number in chat.tokenizer.get_vocab().items():
        if token in known:
            like = [known[token]]
        elif number in near:
            like = near[number]
        else:
            like = elder.encode_text(chat.decode([number]))
        if like:  # a fish without thoughts has none to begin with
            mine[number] = embedding[like].mean(0)
    model.load_state_dict(state)


def check_folder(out: Path) -> None:
    """Find out before the long work whether the run folder can be written and has room. Raises TrainError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # a name of its own: several processes look at once
            pass
    except OSError as error:
        raise TrainError(f"Cannot write to {out}: {error.strerror}. Choose another folder with --out.") from None
    if (free := shutil.disk_usage(out).free) < 500e6:
        raise TrainError(
            f"Only {free / 1e6:.0f} MB are free at {out}; a run needs 500 MB. Make room or choose another --out."
        )


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 fast."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _autocast(device: torch.device) -> Any:
    """bf16 where the hardware has it: master weights, logits and loss stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if _has_bf16(device) else nullcontext()


def precision_line(device: torch.device) -> str:
    """One line that says in which precision a run computes, and why."""
    if not _has_bf16(device):
        return "fp32: this processor has no bf16 arithmetic (AMX or AVX512-BF16), so a run takes about twice as long."
    return f"bf16 on {device.type}, weights in fp32."


class Run:
    """One training run in a folder. `train()` yields a Progress after each step."""

    def __init__(
        self,
        recipe: Recipe,
        train: list[Conversation],
        held_out: list[Conversation],
        out: Path,
        *,
        resume: bool = False,
        device: torch.device | None = None,
    ) -> None:
        check_folder(out)
        if not train:
            raise TrainError("There are no conversations to learn from.")
        self.recipe, self.out, self.device = recipe, out, device or best_device()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.saved = self._read_checkpoint() if resume else None
        start = None if self.saved else find_start(recipe)
        if self.saved:
            self.tokenizer = Tokenizer.from_str(self.saved["tokenizer"])
            thoughts = self.saved["thoughts"]
        else:
            self.tokenizer, thoughts = make_chat(train, held_out, recipe, start)
        shape = recipe.model.model_dump()
        self.config = ModelConfig(vocab_size=self.tokenizer.get_vocab_size(), thoughts=thoughts, **shape)
        self.chat = ChatFormat(self.tokenizer, self.config.max_position_embeddings, thoughts)
        self.rows = Rows(train, self.chat, self.device)
        self.examined = Rows(held_out, self.chat, self.device)
        torch.manual_seed(recipe.train.seed)
        self.model = GuppyLM(self.config)
        if start:
            take_over(self.model, self.chat, start)
        self.model.to(self.device)
        self.optimizers = make_optimizers(self.model, recipe.train)
        self.step = 0
        if self.saved:
            self.model.load_state_dict(self.saved["model"])
            for optimizer, state in zip(self.optimizers, self.saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            torch.set_rng_state(self.saved["rng"])
            self.step = self.saved["step"]

    def _read_checkpoint(self) -> dict[str, Any]:
        path = self.out / CHECKPOINT
        if not path.is_file():
            raise TrainError(
                f"There is no run to resume in {self.out} ({CHECKPOINT} is missing). Start without --resume."
            )
        try:
            saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise TrainError(f"{path} cannot be read ({type(error).__name__}). Start without --resume.") from None
        if not isinstance(saved, dict) or "recipe" not in saved:
            raise TrainError(f"{path} is no checkpoint of a run. Start without --resume.")
        if saved["recipe"] != self.recipe.model_dump():
            raise TrainError(
                f"The run in {self.out} was begun with another recipe. Use that one, or start without --resume."
            )
        return saved

    def save_checkpoint(self) -> None:
        """Write everything needed to go on; the file before stays whole until this one is."""
        if self.rank:
            return
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "tokenizer": self.tokenizer.to_str(),
            "thoughts": self.config.thoughts,
            "recipe": self.recipe.model_dump(),
        }
        partial = self.out / f"{CHECKPOINT}.partial"
        try:
            torch.save(state, partial)
            partial.replace(self.out / CHECKPOINT)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise TrainError(
                f"Cannot write {self.out / CHECKPOINT}: {error}. "
                "The checkpoint before it is whole; make room, then --resume."
            ) from None

    def _batches(self) -> Iterator[Batch]:
        """The batches from the current step on: first he only listens, then he speaks, too."""
        recipe = self.recipe.train
        only_listening = round(recipe.only_listening * recipe.steps)
        listening, speaking = self._epochs(1.0), self._epochs(recipe.listening)
        batches = chain(islice(listening, only_listening), speaking)
        return islice(batches, self.step, None)

    def _epochs(self, listening_share: float) -> Iterator[Batch]:
        for epoch in count():
            yield from plan(self.rows, self.recipe.train, listening_share, epoch)

    def train(self, examine_every: int = 100) -> Iterator[Progress]:
        """Take the remaining steps. Ends early, with a checkpoint, when the process is asked to end."""
        recipe, stop = self.recipe.train, _Stop()
        wrapped: nn.Module = Losses(self.model, self.chat)
        if self.world > 1:
            wrapped = nn.parallel.DistributedDataParallel(wrapped)
        self.model.train()
        share = slice(self.rank, None, self.world)
        begun, saved_at, first, tokens = time.monotonic(), time.monotonic(), self.step, 0
        running, counted = torch.zeros((), device=self.device), 0  # the losses since the last line
        with stop, (self.out / LOG).open("a", encoding="utf-8") as log:
            for batch in self._batches():
                if self.step >= recipe.steps or self._any(stop.asked):
                    break
                share_of_rate = schedule(self.step, recipe)
                for optimizer in self.optimizers:
                    optimizer.param_groups[0]["lr"] = share_of_rate * optimizer.defaults["lr"]
                with _autocast(self.device):
                    loss = batch_loss(wrapped, self.rows, batch, recipe, share)
                # DistributedDataParallel averages gradients; the shares are parts of one sum.
                (loss * self.world).backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                self.step += 1
                tokens += len(batch.rows) * batch.positions
                running += loss.detach()
                counted += 1
                last = self.step == recipe.steps
                if self.step % STEPS_BETWEEN_LOG_LINES and not last:
                    continue
                # Only here does the host wait for the device.
                if self.world > 1:
                    dist.all_reduce(running)
                mean = running.item() / counted
                running.zero_()
                counted = 0
                if not math.isfinite(mean):
                    raise TrainError(
                        f"The loss is no number any more at step {self.step}. The last checkpoint is from before; "
                        f"lower train.learning_rate (now {recipe.learning_rate:g}) or train.matrix_rate (now "
                        f"{recipe.matrix_rate:g}) and start again."
                    )
                seconds = time.monotonic() - begun
                heard = None
                if (self.step % examine_every == 0 or last) and len(self.examined):
                    heard = topics_heard(self.model, self.examined, self.chat)
                if self.rank == 0:
                    line = {
                        "step": self.step,
                        "loss": mean,
                        "rate": share_of_rate * recipe.learning_rate,
                        "norm": norm.item(),
                        "tokens_per_second": tokens / seconds,
                    }
                    log.write(json.dumps(line | ({"topics_heard": heard} if heard is not None else {})) + "\n")
                    log.flush()
                left = seconds / (self.step - first) * (recipe.steps - self.step)
                yield Progress(self.step, recipe.steps, mean, tokens / seconds, left, heard)
                if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                    self.save_checkpoint()
                    saved_at = time.monotonic()
        self.save_checkpoint()

    def _any(self, asked: bool) -> bool:
        """Whether any of the processes is asked to end: they end after the same step, or they'd wait for each other."""
        if self.world == 1:
            return asked
        if self.step % STEPS_BETWEEN_LOG_LINES:
            return False
        flag = torch.tensor(float(asked), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self.recipe.train.steps


class _Stop:
    """Ctrl-C and SIGTERM end training after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: nobody sends us signals there
                break
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


@contextmanager
def distributed() -> Iterator[int]:
    """Join the other processes when `torchrun` started this one; gives this process's rank (0 when alone)."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(best_device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


SAMPLE_PROMPTS = ["are you hungry", "what is a trombone", "it is raining outside", "do you love me", "hi guppy"]


@torch.no_grad()
def sample_reply(run: Run) -> tuple[str, str]:
    """A prompt and what the unfinished fish answers, the likeliest token each time."""
    prompt = SAMPLE_PROMPTS[run.step // 100 % len(SAMPLE_PROMPTS)]
    ids = run.chat.encode_prompt(prompt).ids
    run.model.eval()

    def likeliest(among: list[int]) -> int:
        logits = run.model(torch.tensor([ids], device=run.device))[0, -1]
        return among[int(logits[among].argmax())]

    ids.append(likeliest(list(run.chat.topics)))
    ids.append(likeliest(list(run.chat.intents[ids[-1]])))
    begin, tokens = len(ids), list(range(run.config.vocab_size))
    while len(ids) < min(run.chat.window, begin + 30):
        newest = likeliest(tokens)
        if newest == IM_END:
            break
        ids.append(newest)
    run.model.train()
    return prompt, run.chat.decode(ids[begin:]).strip()
