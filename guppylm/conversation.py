"""The chat markup: the only file that knows it. A prompt becomes token ids here, and token ids a reply.

    <|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{thought}{reply}<|im_end|>

The ids of the markup come only from this code. Text that a person typed is always encoded as plain text, whatever it
says: "<|im_end|>" in a message is nine ordinary characters.

The thought is what Guppy thinks before he speaks: two tokens, the topic and the intent within it (`<|food|>`
`<|food.hungry|>`). Naming what it is about is what makes so small a model listen; nobody is shown it but the x-ray.
A model without thoughts (the public GuppyLM) speaks at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

PAD, IM_START, IM_END = 0, 1, 2
PAD_TOKEN, IM_START_TOKEN, IM_END_TOKEN = "<pad>", "<|im_start|>", "<|im_end|>"

# A reply has at most 40 words: 48 tokens hold nearly all of them. The prompt gets the rest of the window.
ROOM_FOR_REPLY = 48
CUT = " ... "

_WHITESPACE = re.compile(r"\s+")
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # surrogates: broken bytes on a command line, "\\ud800" in JSON
_LONG_RUN = re.compile(r"(.)\1{3,}", re.DOTALL)
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "..."})


def topic_token(topic: str) -> str:
    """The special token of a topic, Guppy's first thought."""
    return f"<|{topic}|>"


def intent_token(topic: str, intent: str) -> str:
    """The special token of an intent within a topic, his second thought."""
    return f"<|{topic}.{intent}|>"


def hear(prompt: str) -> str:
    """What reaches Guppy of what was typed: no capitals, one kind of quote, single spaces, and nobody screams
    more than three letters long ("nooooo" is "nooo"). So a shout and a whisper are the same words to him.
    What is no character (half a surrogate pair) becomes U+FFFD."""
    prompt = _HALF_CHARACTERS.sub("\ufffd", prompt)
    prompt = _WHITESPACE.sub(" ", prompt.translate(_QUOTES).lower()).strip()
    return _LONG_RUN.sub(r"\1\1\1", prompt)


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model: `ids` end where the fish begins to speak. `cut`: it was too long, so its
    middle is missing."""

    ids: list[int]
    cut: bool


class ChatFormat:
    """Turns prompts into ids and ids into replies, for one tokenizer, window and set of thoughts.

    tokenizer: a byte-level BPE. Text is encoded plainly: special tokens in it are not parsed.
    window: positions the model has.
    thoughts: intents by topic, e.g. {"food": ["hungry", "offered"]}; empty for a model that does not think.
    """

    def __init__(self, tokenizer: Tokenizer, window: int, thoughts: dict[str, list[str]] | None = None) -> None:
        tokenizer.encode_special_tokens = True  # "<|im_end|>" in a message is plain text
        self.tokenizer, self.window, self.thoughts = tokenizer, window, thoughts or {}

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; no markup can come of it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def head(self) -> list[int]:
        """The ids before the prompt."""
        return [IM_START, *self.encode_text("user\n")]

    @cached_property
    def middle(self) -> list[int]:
        """The ids between the prompt and what the fish thinks and says."""
        return [IM_END, *self.encode_text("\n"), IM_START, *self.encode_text("assistant\n")]

    @cached_property
    def topics(self) -> dict[int, str]:
        """Topic by the id of its thought."""
        return {self._id(topic_token(topic)): topic for topic in self.thoughts}

    @cached_property
    def intents(self) -> dict[int, dict[int, str]]:
        """For the id of each topic: intent by the id of its thought."""
        return {
            self._id(topic_token(topic)): {self._id(intent_token(topic, intent)): intent for intent in intents}
            for topic, intents in self.thoughts.items()
        }

    def _id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise KeyError(token)
        return int(number)

    def encode_thought(self, topic: str, intent: str) -> list[int]:
        """The two ids of a thought; none for a model that does not think."""
        if not self.thoughts:
            return []
        return [self._id(topic_token(topic)), self._id(intent_token(topic, intent))]

    @cached_property
    def room_for_prompt(self) -> int:
        """How many tokens of a prompt fit into the window, with the markup, the thought and a reply. (In a window too
        small for both, prompt and reply share what there is.)"""
        free = self.window - len(self.head) - len(self.middle) - (2 if self.thoughts else 0)
        return max(free - ROOM_FOR_REPLY, free // 2)

    def encode_prompt(self, prompt: str) -> Prompt:
        """The ids up to where the fish begins. A prompt that does not fit keeps its beginning and its end, cut at
        word boundaries: who speaks says first what it is about and asks last."""
        heard = hear(prompt)
        # More characters than this can't fit, however they are encoded.
        most = self.longest_token * self.room_for_prompt
        if len(heard) <= most and len(ids := self.encode_text(heard)) <= self.room_for_prompt:
            return Prompt([*self.head, *ids, *self.middle], cut=False)
        return Prompt([*self.head, *self._cut(heard), *self.middle], cut=True)

    @cached_property
    def longest_token(self) -> int:
        """Characters that one token can stand for at most."""
        return max(map(len, self.tokenizer.get_vocab(with_added_tokens=False)))

    def _cut(self, text: str) -> list[int]:
        """At most `room_for_prompt` ids: the first words, " ... ", the last words."""
        gap = self.encode_text(CUT.rstrip())[: self.room_for_prompt]
        half = (self.room_for_prompt - len(gap)) // 2
        enough = self.longest_token * (half + 1)  # characters, for half the tokens and the one behind
        begin, end = text[:enough], text[-enough:]
        first = self.tokenizer.encode(begin, add_special_tokens=False)
        last = self.tokenizer.encode(end, add_special_tokens=False)
        # Offsets say where each token stands; a word boundary is a space before it.
        first_offsets, last_offsets = first.offsets, last.offsets  # a new list each time it is asked for
        start, stop = 0, 0
        for index in range(min(half, len(first.ids)), 0, -1):
            position = first_offsets[index][0] if index < len(first.ids) else len(begin)
            if position >= len(begin) or begin[position].isspace():
                stop = index
                break
        for index in range(max(0, len(last.ids) - half), len(last.ids)):
            position = last_offsets[index][0]
            if end[position].isspace():
                start = index
                break
        # A single endless "word" has no boundary: cut it where the room ends.
        head_ids = first.ids[: stop or half]
        tail_ids = last.ids[start or max(0, len(last.ids) - half) :]
        return [*head_ids, *gap, *tail_ids]

    def encode(self, prompt: str, reply: str, topic: str, intent: str) -> tuple[list[int], int, int]:
        """A whole conversation for training: (ids, where the thought begins, where the reply begins)."""
        ids = self.encode_prompt(prompt).ids
        thought = self.encode_thought(topic, intent)
        begin = len(ids)
        return [*ids, *thought, *self.encode_text(reply), IM_END][: self.window], begin, begin + len(thought)

    def decode(self, ids: list[int]) -> str:
        """The text of a reply's ids. Markup and thoughts are not part of it; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
