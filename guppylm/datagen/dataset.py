"""The data set: 60,000 conversations, composed from a character by a seed, and what can be said about it.

Each conversation is `{"input": what a person types, "output": what the fish answers, "category": topic}`, the public
data set's format, with one key more: `"intent"`, how the subject came up. `guppy data` writes `train.jsonl` and
`held_out.jsonl`. Held out means held out by wording: one phrasing in twenty, and one filler in twenty of every long
list, never stand in the training file, so no prompt stands in both.

Same seed, same bytes.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from guppylm.datagen.grammar import Character, Chooser, Intent, Line, Topic, held_out
from guppylm.datagen.habits import as_typed
from guppylm.datagen.lint import LONGEST_REPLY, style_fault

# What a fish can't know is most of the world, and small talk comes next: they get more room than one topic.
WEIGHTS = {"confused": 6.0, "misc": 3.0}
ASIDE_SHARE = 0.35
RAMBLING_SHARE = 0.08  # two or three sentences of one intent
LONG_SHARE = 0.015  # so long that all positions are trained


@dataclass(frozen=True, slots=True)
class Conversation:
    """One message and its reply. `wording` is the template it was made from, before slots and typing habits."""

    prompt: str
    reply: str
    topic: str
    intent: str
    wording: str = ""

    def row(self) -> dict[str, str]:
        """The conversation as a row of the data set."""
        return {"input": self.prompt, "output": self.reply, "category": self.topic, "intent": self.intent}


Card = TypeVar("Card")


class Deck(Generic[Card]):
    """Deals cards in random order, all of them before any comes again."""

    def __init__(self, cards: list[Card], rng: random.Random) -> None:
        self._cards, self._rng = cards, rng
        self._left: list[Card] = []

    def deal(self) -> Card:
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return self._left.pop()


class Composer:
    """Composes conversations of a character. `examine=True` composes from held-out wordings only.

    An endless source: the same character and seed always give the same sequence.
    """

    def __init__(self, character: Character, seed: int, *, examine: bool = False) -> None:
        self._character, self._examine = character, examine
        self._rng = random.Random(f"{character.name}/{seed}/{'examine' if examine else 'train'}")
        self._phrasings = {
            topic.name: Deck(lines, self._rng)
            for topic in character.topics.values()
            if (lines := self._wordings(topic))
        }
        self._replies = {
            (topic.name, intent.name): Deck(intent.replies, self._rng)
            for topic in character.topics.values()
            for intent in topic.intents.values()
        }
        self._asides = {
            topic.name: Deck(topic.asides, self._rng) for topic in character.topics.values() if topic.asides
        }
        self._topics = list(self._phrasings)
        self._weights = [WEIGHTS.get(topic, 1.0) for topic in self._topics]

    def _wordings(self, topic: Topic) -> list[tuple[Intent, Line]]:
        return [
            (intent, line)
            for intent in topic.intents.values()
            for line in intent.phrasings
            if held_out(topic.name, line.text) == self._examine
        ]

    def _say(self, topic: Topic, intent: Intent, first: Line, choose: Chooser) -> str:
        """What the person says: mostly one phrasing, now and then several of the same intent."""
        said = [first.fill(choose)]
        roll = self._rng.random()
        if roll < LONG_SHARE + RAMBLING_SHARE:
            more = [line for of, line in self._wordings(topic) if of is intent and line is not first]
            self._rng.shuffle(more)
            wanted = self._rng.randint(250, 420) if roll < LONG_SHARE else self._rng.randint(60, 160)  # characters
            while more and sum(map(len, said)) < wanted:
                said.append(more.pop().fill(choose))
        return self._rng.choice([". ", ". ", ", ", " and ", "... ", "! "]).join(said)

    def __iter__(self) -> Iterator[Conversation]:
        while True:
            yield self.conversation()

    def conversation(self) -> Conversation:
        """The next conversation."""
        rng = self._rng
        topic = self._character.topics[rng.choices(self._topics, self._weights)[0]]
        intent, line = self._phrasings[topic.name].deal()
        choose = Chooser(self._character, topic, rng, examine=self._examine)
        prompt = as_typed(self._say(topic, intent, line, choose), rng)
        reply = self._replies[topic.name, intent.name].deal().fill(choose)
        asides = self._asides.get(topic.name)
        if asides and rng.random() < ASIDE_SHARE:
            with_aside = f"{reply} {asides.deal().fill(choose)}"
            if len(with_aside.split()) <= LONGEST_REPLY:
                reply = with_aside
        return Conversation(prompt, reply, topic.name, intent.name, line.text)


def normalised(prompt: str) -> str:
    """The prompt without capitals, punctuation and emoji: what makes two prompts the same wording."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", prompt.lower().replace("’", "'")))


def compose(character: Character, count: int, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held-out) conversations, `count` in all, one in twenty of them held out.

    A held-out prompt that a training prompt happens to equal is composed again, so the overlap is zero.
    """
    examined = count // 20
    train_stream, held_out_stream = iter(Composer(character, seed)), iter(Composer(character, seed, examine=True))
    train = [next(train_stream) for _ in range(count - examined)]
    known = {normalised(conversation.prompt) for conversation in train}
    fresh = (conversation for conversation in held_out_stream if normalised(conversation.prompt) not in known)
    return train, [next(fresh) for _ in range(examined)]


def write_jsonl(path: Path, conversations: Iterable[Conversation]) -> None:
    """One JSON object a line, UTF-8, the same bytes for the same conversations."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for conversation in conversations:
            file.write(json.dumps(conversation.row(), ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Conversation]:
    """The conversations of a data file (ours or the public GuppyLM's). Errors name file and line."""
    conversations = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                texts = (row["input"], row["output"], row["category"], row.get("intent", row["category"]))
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError("all of them are texts")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                needed = "each line is a JSON object with input, output, category"
                raise ValueError(f"{path}:{number} is no conversation; {needed} ({error!r}).") from None
            conversations.append(Conversation(*texts))
    return conversations


def report(train: list[Conversation], examined: list[Conversation]) -> dict[str, Any]:
    """Counts, distinctness, overlap and style of a data set, as `guppy data --report` prints them."""
    everything = train + examined
    topics: dict[str, dict[str, Any]] = {}
    for name in sorted({conversation.topic for conversation in everything}):
        rows = [conversation for conversation in everything if conversation.topic == name]
        replies = Counter(conversation.reply for conversation in rows)
        topics[name] = {
            "conversations": len(rows),
            "distinct prompts": len({conversation.prompt for conversation in rows}),
            "distinct replies": len(replies),
            "most frequent reply": replies.most_common(1)[0][1] / len(rows),
        }
    known = {normalised(conversation.prompt) for conversation in train}
    return {
        "conversations": len(everything),
        "held out": len(examined),
        "distinct prompts": len({conversation.prompt for conversation in everything}),
        "distinct replies": len({conversation.reply for conversation in everything}),
        "prompts in both": sum(normalised(conversation.prompt) in known for conversation in examined),
        "replies with a fault of style": sum(
            style_fault(conversation.reply) is not None for conversation in everything
        ),
        "topics": topics,
    }
