"""How people really type: turns a clean phrasing into what would stand in a chat.

Capitals, punctuation, dropped apostrophes, slang, typos, stretched words, emoji, "hey guppy" before and "lol" after.
Nothing here changes what is meant. The word tables are in `habits.toml`.
"""

from __future__ import annotations

import random
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_VOWEL_RUN = re.compile(r"[aeiouy](?=[a-z]?\b)")


@cache
def _tables() -> dict[str, Any]:
    with Path(__file__).with_name("habits.toml").open("rb") as file:
        return tomllib.load(file)


def _slang(text: str, rng: random.Random) -> str:
    """`you are` -> `u r`, each with its own chance, at word borders."""
    for plain, shorts in _tables()["slang"].items():
        if plain in text and rng.random() < 0.5:
            word = re.compile(rf"(?<![\w'])({re.escape(plain)})(?![\w'])")
            text = word.sub(lambda _, shorts=shorts: str(rng.choice(shorts)), text)  # type: ignore[misc]
    return text


def _typo(text: str, rng: random.Random) -> str:
    """One slip of the finger in one word of four letters or more (the first letter stays, as it mostly does)."""
    words = [match for match in _WORD.finditer(text) if len(match[0]) >= 4]
    if not words:
        return text
    word = rng.choice(words)
    at = rng.randrange(word.start() + 1, word.end())
    match rng.randrange(4):
        case 0:  # two letters change places
            at = min(at, word.end() - 2)
            return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        case 1:  # a letter is missed
            return text[:at] + text[at + 1 :]
        case 2:  # a letter comes twice
            return text[:at] + text[at] + text[at:]
        case _:  # the finger hits the next key
            near = _tables()["keyboard"].get(text[at])
            return text[:at] + (rng.choice(near) if near else text[at]) + text[at + 1 :]


def _stretch(text: str, rng: random.Random) -> str:
    """`so cold` -> `so coooold`: the last vowel of one word."""
    words = [match for match in _WORD.finditer(text) if _VOWEL_RUN.search(match[0])]
    if not words:
        return text
    word = rng.choice(words)
    vowel = list(_VOWEL_RUN.finditer(text, word.start(), word.end()))
    if not vowel:
        return text
    at = vowel[-1].start()
    return text[:at] + text[at] * rng.randint(2, 5) + text[at:]


def _is_question(text: str) -> bool:
    last = re.split(r"[.!?,;] ", text)[-1]
    return last.startswith(tuple(_tables()["question_starts"]))


def _end(text: str, rng: random.Random) -> str:
    if not text[-1].isalnum():
        return text
    ends = _tables()["question_ends" if _is_question(text) else "statement_ends"]
    end: str = rng.choice(ends)
    return text + end


def _capitals(text: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.07:
        return text.upper()
    if roll < 0.14:
        return text
    text = re.sub(r"(?<![\w'])i(?=['\s]|$)", "I", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def as_typed(text: str, rng: random.Random) -> str:
    """`text` (clean, lowercase) as a person might type it. About one in four stays as it is."""
    if rng.random() < 0.25:
        return text
    tables = _tables()
    if rng.random() < 0.25:
        text = _slang(text, rng)
    if rng.random() < 0.15:
        text = _typo(text, rng)
    if rng.random() < 0.03:
        text = _stretch(text, rng)
    if rng.random() < 0.12:
        text = rng.choice(tables["before"]) + text
    if rng.random() < 0.5:
        text = _end(text, rng)
    if rng.random() < 0.10:
        text += rng.choice(tables["after"])
    if rng.random() < 0.25:
        text = text.replace("'", "" if rng.random() < 0.8 else "’")
    if rng.random() < 0.45:
        text = _capitals(text, rng)
    if rng.random() < 0.06:
        text += " " * rng.randint(0, 1) + rng.choice(tables["emoji"]) * rng.choice([1, 1, 1, 2, 3])
    return text
