"""How much sooner is our loop there than the textbook's? Both on the same conversations, in one run.

    python training/speedrun.py [--recipe quick] [--minutes 60] [--json FILE]

The textbook: fp32, 32 random rows a step padded to the longest, every token counts, AdamW at 3e-4, dropout 0.1,
GPT-2's initialisation, no thought before the reply, and a model of the public GuppyLM's size (Shape's defaults). Ours:
`guppy train` with a recipe, and a model of the size that the recipe says.

The clock of each stops while it is examined, every `SECONDS_BETWEEN_EXAMS` of training, on held-out wordings:

on topic    share of greedy replies that are about what was said (`guppy evaluate`'s judgement)
reply loss  nats a token of the right reply. Ours has to find its thought first, and pays for it: the loss of the two
            thought tokens is counted as the reply's, so its figure is an upper bound.

Printed is when each reached what ours had reached after half, 80 %, 90 % and all of its time.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from guppylm.checkpoint import Checkpoint
from guppylm.conversation import IM_END, ChatFormat
from guppylm.datagen.dataset import Conversation, compose
from guppylm.datagen.grammar import Character, load_character
from guppylm.engine import Engine, Sampling
from guppylm.model import GuppyLM, ModelConfig
from guppylm.recipe import Recipe, Shape, load_recipe
from guppylm.tokenizer import train_tokenizer
from guppylm.train import Run

SECONDS_BETWEEN_EXAMS = 20.0
EXAMINED = 300
BATCH, RATE, WARMUP, DROPOUT = 32, 3e-4, 200, 0.1
STEPS = 10_000  # the cosine's length


@dataclass(frozen=True)
class Exam:
    """What a model could do after so many seconds of training."""

    seconds: float
    on_topic: float
    reply_loss: float


@torch.no_grad()
def reply_loss(model: GuppyLM, chat: ChatFormat, conversations: list[Conversation]) -> float:
    """Nats a token of the reply, with those of the thought before it."""
    nats, tokens = 0.0, 0
    for begin in range(0, len(conversations), 64):
        for_each = []
        for c in conversations[begin : begin + 64]:
            prompt = chat.encode_prompt(c.prompt).ids
            thought = chat.encode_thought(c.topic, c.intent)
            ids = [*prompt, *thought, *chat.encode_text(c.reply), IM_END][: chat.window]
            for_each.append((ids, len(prompt), len(thought)))
        longest = max(len(ids) for ids, _, _ in for_each)
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _, _ in for_each])
        logits = model(padded[:, :-1])
        for row, (ids, start, thinking) in enumerate(for_each):
            for at in range(start, start + thinking):  # a thought competes with thoughts only
                rivals = list(chat.topics) if at == start else list(chat.intents[ids[start]])
                nats -= float(logits[row, at - 1, rivals].log_softmax(-1)[rivals.index(ids[at])])
            begin_reply = start + thinking
            targets = padded[row, begin_reply : len(ids)]
            nats += float(F.cross_entropy(logits[row, begin_reply - 1 : len(ids) - 1], targets, reduction="sum"))
            tokens += len(targets)
    return nats / tokens


async def replies(model: GuppyLM, chat: ChatFormat, prompts: list[str]) -> list[str]:
    """The greedy reply to each prompt."""
    # A copy: the engine may round the weights it is given.
    engine = Engine.of(Checkpoint(Path("speedrun"), copy.deepcopy(model), chat), max_waiting=len(prompts))
    try:
        greedy = Sampling(temperature=0)
        return [c.text for c in await asyncio.gather(*(engine.ask(prompt, greedy, seed=0) for prompt in prompts))]
    finally:
        await engine.aclose()


def examine(
    model: GuppyLM, chat: ChatFormat, character: Character, held_out: list[Conversation]
) -> tuple[float, float]:
    """(share of replies on topic, reply loss)"""
    model.eval()
    said = asyncio.run(replies(model, chat, [c.prompt for c in held_out]))
    right = [character.topics[c.topic].is_about(reply) for c, reply in zip(held_out, said, strict=True)]
    loss = reply_loss(model, chat, held_out)
    model.train()
    return sum(right) / len(right), loss


def textbook(conversations: list[Conversation], recipe: Recipe) -> tuple[GuppyLM, ChatFormat, Iterator[None]]:
    """The textbook's model and loop; each item of the iterator is a step taken."""
    prompts, answers = [c.prompt for c in conversations], [c.reply for c in conversations]
    tokenizer = train_tokenizer(prompts, answers, {}, recipe.tokenizer.vocab_size)
    shape = Shape(hidden_dropout_prob=DROPOUT).model_dump()
    config = ModelConfig(vocab_size=tokenizer.get_vocab_size(), **shape)
    chat = ChatFormat(tokenizer, config.max_position_embeddings)
    torch.manual_seed(recipe.train.seed)
    model = GuppyLM(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    rows = [
        [*chat.encode_prompt(c.prompt).ids, *chat.encode_text(c.reply), IM_END][: chat.window] for c in conversations
    ]

    def steps() -> Iterator[None]:
        rng = random.Random(recipe.train.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        rising = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP, eta_min=RATE / 10)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], [WARMUP])
        model.train()
        for _ in range(STEPS):
            some = rng.sample(rows, BATCH)
            longest = max(map(len, some))
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in some])
            logits = model(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield

    return model, chat, steps()


def race(
    name: str,
    steps: Iterator[object],
    exam: Callable[[], tuple[float, float]],
    limit: float,
    stop: Callable[[Exam], bool],
) -> list[Exam]:
    """Train until there are no more steps, `limit` seconds have passed, or `stop` says so; the exams on the way."""
    exams: list[Exam] = []
    seconds, due = 0.0, SECONDS_BETWEEN_EXAMS
    ended = False
    while not ended:
        begun = time.perf_counter()
        ended = next(steps, steps) is steps
        seconds += time.perf_counter() - begun
        ended = ended or seconds > limit
        if seconds < due and not ended:
            continue
        due += SECONDS_BETWEEN_EXAMS
        exams.append(Exam(seconds, *exam()))
        newest = exams[-1]
        console.print(f"{name:9} {seconds:6.0f} s  on topic {newest.on_topic:5.1%}  reply loss {newest.reply_loss:.2f}")
        ended = ended or stop(newest)
    return exams


def first(exams: list[Exam], reached: Callable[[Exam], bool]) -> float | None:
    """After how many seconds `reached` held first."""
    return next((exam.seconds for exam in exams if reached(exam)), None)


console = Console(highlight=False)


def main() -> None:
    """Ours to the end of its recipe, then the textbook until it is as good or `--minutes` have passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quick", help="our recipe")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long the textbook may take")
    parser.add_argument("--json", type=Path, help="write all exams to this file, too")
    arguments = parser.parse_args()

    recipe = load_recipe(arguments.recipe)
    character = load_character(recipe.data.character)
    train, held_out = compose(character, recipe.data.conversations, recipe.data.seed)
    held_out = held_out[:EXAMINED]
    console.print(f"{len(train):,} conversations, {torch.get_num_threads()} threads")

    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, train, held_out, Path(folder), device=torch.device("cpu"))
        ours = race(
            "ours", run.train(examine_every=recipe.train.steps),
            lambda: examine(run.model, run.chat, character, held_out), float("inf"), lambda _: False,
        )  # fmt: skip
    end = ours[-1]
    model, chat, steps = textbook(train, recipe)
    theirs = race(
        "textbook", steps,
        lambda: examine(model, chat, character, held_out), 60 * arguments.minutes,
        lambda e: e.on_topic >= end.on_topic and e.reply_loss <= end.reply_loss,
    )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({"ours": [vars(e) for e in ours], "textbook": [vars(e) for e in theirs]}))

    table = Table("", "ours", "textbook", "times")
    for tenths in (5, 8, 9, 10):
        so_far = ours[: math.ceil(len(ours) * tenths / 10)]
        topic, loss = max(exam.on_topic for exam in so_far), min(exam.reply_loss for exam in so_far)
        for name, reached in (
            (f"on topic {topic:.1%}", lambda e, goal=topic: e.on_topic >= goal),
            (f"reply loss {loss:.2f}", lambda e, goal=loss: e.reply_loss <= goal),
        ):
            sooner, later = first(ours, reached), first(theirs, reached)
            assert sooner is not None
            waited = theirs[-1].seconds if later is None else later
            never = "more than " if later is None else ""
            table.add_row(name, f"{sooner:.0f} s", f"{never}{waited:.0f} s", f"{never}{waited / sooner:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
