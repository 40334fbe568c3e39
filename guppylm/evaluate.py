"""How good is this fish? One page of figures, the same for every model folder.

It listens:   on-topic rate on prompts written by hand, as people would ask, never produced by the data generator and
              never trained on (characters/guppy/evaluation.jsonl); beside it what chance and a linear classifier reach
It speaks:    style, distinct replies to one prompt, share of replies that stand in the training data
It learnt:    loss on held-out wordings, in nats a token and bits a byte

A reply is on topic when it uses one of the words by which the topic is known (the `@` lines of the topic files), for
any of the topics that the prompt's writer would accept. It judges only what was said, so it works for any model.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from guppylm.baseline import LinearBaseline
from guppylm.checkpoint import Checkpoint
from guppylm.conversation import ChatFormat
from guppylm.datagen.dataset import Conversation, compose
from guppylm.datagen.grammar import Character, CharacterError
from guppylm.datagen.lint import style_fault
from guppylm.engine import Completion, Engine, Sampling
from guppylm.model import GuppyLM

EVALUATION = "evaluation.jsonl"
# Topics of the evaluation prompts that are not about Guppy's 60 subjects.
UNKNOWN, SMALL_TALK = "confused", "misc"
SHOWN = [
    "hi guppy", "are you hungry", "what is a trombone", "my nephew drew a picture of you", "do you love me",
    "it's raining outside", "goodnight little fish", "tell me a joke",
]  # fmt: skip
ASKED_OFTEN = ["hi guppy", "are you hungry", "do you ever feel lonely", "what is a trombone"]


@dataclass(frozen=True)
class Prompt:
    """A prompt of the evaluation set, and the topics a reply may be about."""

    prompt: str
    topics: list[str]

    @property
    def kind(self) -> str:
        """Which line of the page it counts for."""
        if UNKNOWN in self.topics:
            return "things it can't know"
        return "small talk" if SMALL_TALK in self.topics else "its topics"


def read_prompts(character: Character) -> list[Prompt]:
    """The character's evaluation set. Raises CharacterError naming file and line."""
    path = character.path / EVALUATION
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except FileNotFoundError:
        raise CharacterError(f"{path} is missing; it holds the prompts to examine with.") from None
    except UnicodeDecodeError as error:
        raise CharacterError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt = Prompt(row["prompt"], row["topics"])
            if not isinstance(prompt.prompt, str) or not isinstance(prompt.topics, list) or not prompt.topics:
                raise TypeError("a text and a list are needed")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CharacterError(f"{path}:{number}: not a prompt with its topics ({error!r}).") from None
        if unknown := [topic for topic in prompt.topics if topic not in character.topics]:
            raise CharacterError(f"{path}:{number}: unknown topic '{unknown[0]}'.")
        prompts.append(prompt)
    return prompts


def on_topic(character: Character, prompt: Prompt, reply: str) -> bool:
    """Whether the reply is about one of the topics that the prompt may be about."""
    return any(character.topics[topic].is_about(reply) for topic in prompt.topics)


@torch.no_grad()
def losses(model: GuppyLM, chat: ChatFormat, conversations: list[Conversation]) -> dict[str, float]:
    """Loss on conversations: of the reply (nats a token, bits a byte) and of the prompt (nats a token)."""
    nats = {"prompt": 0.0, "reply": 0.0}
    counts = {"prompt": 0, "reply": 0}
    letters = 0
    for begin in range(0, len(conversations), 64):
        some = conversations[begin : begin + 64]
        rows = [_encode(chat, c) for c in some]
        longest = max(len(ids) for ids, _, _ in rows)
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _, _ in rows])
        loss = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        for row, (tokens, prompt_end, reply_at), conversation in zip(loss, rows, some, strict=True):
            spans = {"prompt": (len(chat.head), prompt_end), "reply": (reply_at, len(tokens))}
            for part, (start, stop) in spans.items():
                nats[part] += float(row[start - 1 : stop - 1].sum())
                counts[part] += stop - start
            letters += len(conversation.reply.encode())
    return {
        "reply, nats a token": nats["reply"] / counts["reply"],
        "reply, bits a byte": nats["reply"] / letters / math.log(2),
        "prompt, nats a token": nats["prompt"] / counts["prompt"],
    }


def _encode(chat: ChatFormat, conversation: Conversation) -> tuple[list[int], int, int]:
    """(ids, where the prompt ends, where the reply begins). A thought unknown to the model is left out."""
    thought = conversation.intent in chat.thoughts.get(conversation.topic, [])
    head = chat.encode_prompt(conversation.prompt).ids
    if not thought:
        tokens = [*head, *chat.encode_text(conversation.reply), 2][: chat.window]
        return tokens, len(head) - len(chat.middle), len(head)
    tokens, _, reply_at = chat.encode(conversation.prompt, conversation.reply, conversation.topic, conversation.intent)
    return tokens, len(head) - len(chat.middle), reply_at


def _sentences(reply: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.?])\s+", reply)]


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


async def _ask_all(engine: Engine, prompts: list[str], sampling: Sampling, seed: int) -> list[Completion]:
    gate = asyncio.Semaphore(engine.max_batch)

    async def ask(index: int, prompt: str) -> Completion:
        async with gate:
            return await engine.ask(prompt, sampling, seed=seed + index)

    return list(await asyncio.gather(*(ask(i, prompt) for i, prompt in enumerate(prompts))))


async def evaluate(
    loaded: Checkpoint,
    character: Character,
    *,
    conversations: int = 60_000,
    data_seed: int = 1,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    baseline: bool = True,
) -> dict[str, Any]:
    """The evaluation page as data. `conversations` and `data_seed` make the data set it is compared with."""
    prompts = read_prompts(character)
    train, held_out = compose(character, conversations, data_seed)
    page: dict[str, Any] = {"model": loaded.path.name, "parameters": loaded.model.parameter_count()}
    page["loss on held-out wordings"] = losses(loaded.model, loaded.format, held_out[:1000])

    engine = Engine.of(loaded)
    try:
        completions = await _ask_all(engine, [p.prompt for p in prompts], sampling, seed)
        often = {p: await _ask_all(engine, [p] * 50, sampling, seed) for p in ASKED_OFTEN}
        shown = await _ask_all(engine, SHOWN, sampling, seed)
    finally:
        await engine.aclose()

    rng = random.Random(seed)
    chance = [rng.choice(train).reply for _ in prompts]
    named: dict[str, list[str]] = {}
    if loaded.format.thoughts:
        named["topic thought of"] = [completion.topic or "" for completion in completions]
    if baseline:
        classifier = LinearBaseline([c.prompt for c in train], [c.topic for c in train])
        named["topic named by the linear baseline"] = classifier.topics([p.prompt for p in prompts])
    listening: dict[str, Any] = {}
    for kind in ("its topics", "things it can't know", "small talk"):
        some = [i for i, p in enumerate(prompts) if p.kind == kind]
        listening[kind] = {
            "prompts": len(some),
            "reply on topic": _share([on_topic(character, prompts[i], completions[i].text) for i in some]),
            "a random reply on topic": _share([on_topic(character, prompts[i], chance[i]) for i in some]),
            **{name: _share([topics[i] in prompts[i].topics for i in some]) for name, topics in named.items()},
        }
    page["listening"] = listening

    replies = [completion.text for completion in completions]
    known = {c.reply for c in train}
    known_sentences = {sentence for reply in known for sentence in _sentences(reply)}
    verbatim = [reply in known for reply in replies]
    pieces = [all(s in known_sentences for s in _sentences(reply)) for reply in replies]
    page["speaking"] = {
        "style right": _share([style_fault(reply) is None for reply in replies]),
        "markup or thought shown": sum("<|" in reply for reply in replies),
        "verbatim in the training data": _share(verbatim),
        "recombined from its sentences": _share([p and not v for p, v in zip(pieces, verbatim, strict=True)]),
        "new": _share([not p for p in pieces]),
        "distinct replies of 50": {p: len({c.text for c in some}) for p, some in often.items()},
    }
    page["style faults"] = dict(Counter(fault.split(" '")[0] for reply in replies if (fault := style_fault(reply))))
    page["replies"] = {prompt: completion.text for prompt, completion in zip(SHOWN, shown, strict=True)}
    page["answers"] = [
        {
            **asdict(prompt),
            "reply": c.text,
            "topic": c.topic,
            "intent": c.intent,
            "on topic": on_topic(character, prompt, c.text),
        }
        for prompt, c in zip(prompts, completions, strict=True)
    ]
    return page


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _cell(text: str) -> str:
    """Text within a table: no bar ends the cell, no new line the row."""
    return " ".join(text.replace("|", "\\|").split())


def as_markdown(page: dict[str, Any]) -> str:
    """The page for people: what a model card and the terminal show."""
    kinds = page["listening"]
    rows = [name for name in next(iter(kinds.values())) if name != "prompts"]
    lines = [
        "### Does it listen?",
        "",
        "| | " + " | ".join(f"{kind} ({of['prompts']} prompts)" for kind, of in kinds.items()) + " |",
        "|---|" + "---|" * len(kinds),
        *(f"| {row} | {' | '.join(_percent(of[row]) for of in kinds.values())} |" for row in rows),
        "",
        "### Does it speak well?",
        "",
        "| | |",
        "|---|---|",
    ]
    for name, value in page["speaking"].items():
        if isinstance(value, dict):
            text = ", ".join(f"{count} to “{prompt}”" for prompt, count in value.items())
        else:
            text = str(value) if isinstance(value, int) else _percent(value)
        lines.append(f"| {name} | {text} |")
    lines += ["", "### What it learnt: loss on wordings it never saw", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in page["loss on held-out wordings"].items()]
    lines += ["", "### What it says", "", "| to | Guppy says |", "|---|---|"]
    lines += [f"| {_cell(prompt)} | {_cell(reply)} |" for prompt, reply in page["replies"].items()]
    return "\n".join(lines) + "\n"
