"""The grammar of a character: reads its topic files and composes what people say and what the fish answers.

A character is a folder (see `characters/guppy/`): `words.txt` with word lists that all topics share, and
`topics/*.txt`, one file a topic. A topic file is plain text, one thing a line:

    # Food: hunger, meals, being fed.               a comment
    @ food, flake*, hungry                          words by which a reply shows that it is about this topic
    = fruit                                         a word list: comma-separated fillers until an empty line
    apple, banana, kiwi
    + i will keep my mouth open, in case.           an aside: may follow any reply of the topic
    [hungry] asked whether he is hungry             an intent: one way the subject comes up
    > do you want some {foods}                      a phrasing: what a person says
    - yes. {foods} are my favorite thing.           a reply: what the fish answers

`{foods}` is a slot, filled afresh for every conversation; the same slot gets the same filler in the phrasing and
in its reply, so the fish can take up what was said. `{foods:2}` is a second, different filler. "a {fruit}"
becomes "an apple" by itself. A repeated `[hungry]` header continues that intent.

Every mistake in a file is a `CharacterError` that names file and line.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

CHARACTERS = Path(__file__).parent.parent / "characters"

_SLOT = re.compile(r"\{([a-z_]+)(?::([2-9]))?\}")
_ARTICLE = re.compile(r"(^| )(an?) $")
_NAME = re.compile(r"[a-z][a-z_]*")
# A sound, not a letter, decides between "a" and "an".
_SOUNDS_LIKE_CONSONANT = re.compile(r"(?:uni(?!n|m)|us[ei]|utensil|ukulele|eu|one\b|once\b|ufo|u[- ])")
_SOUNDS_LIKE_VOWEL = re.compile(r"(?:[aeiou]|hour|honest|heir|honor|x-ray|mri\b|8|11\b|18\b)")

# One wording in twenty, and one filler in twenty of every long list, is never shown in training:
# on these the fish is examined.
HELD_OUT_SHARE = 20
SHORTEST_SPLIT_LIST = 20


class CharacterError(ValueError):
    """A character file cannot be used; the message names file and line and says what to do."""


def article(filler: str) -> str:
    """The indefinite article that goes before `filler`: "a" or "an"."""
    if _SOUNDS_LIKE_CONSONANT.match(filler):
        return "a"
    return "an" if _SOUNDS_LIKE_VOWEL.match(filler) else "a"


def held_out(*key: str) -> bool:
    """Whether the wording `key` is kept for examination. Depends on the text alone, never on a seed or on order,
    so that adding lines to a file moves no other line across the split."""
    digest = hashlib.blake2b("/".join(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Line:
    """One line of a topic file: text with slots, and where it stands."""

    text: str
    where: str

    @cached_property
    def slots(self) -> list[tuple[str, str]]:
        """(list name, index) of every slot in the text; the index is "" or "2" to "9"."""
        return [(name, index or "") for name, index in _SLOT.findall(self.text)]

    @cached_property
    def _parts(self) -> list[tuple[str, str, str]]:
        """(literal before the slot, list name, index) for each slot, then (last literal, "", "")."""
        parts, end = [], 0
        for match in _SLOT.finditer(self.text):
            parts.append((self.text[end : match.start()], match[1], match[2] or ""))
            end = match.end()
        return [*parts, (self.text[end:], "", "")]

    def fill(self, choose: Callable[[str, str], str]) -> str:
        """The text with every slot filled by `choose`."""
        if "{" not in self.text:
            return self.text
        out = []
        for literal, name, index in self._parts:
            if not name:
                out.append(literal)
                continue
            filler = choose(name, index)
            if match := _ARTICLE.search(literal):
                literal = literal[: match.start(2)] + article(filler) + " "
            out += literal, filler
        return "".join(out)


@dataclass
class WordList:
    """A named list of fillers. `train` and `examine` split it: what training never sees, examination may use."""

    name: str
    where: str
    fillers: list[str] = field(default_factory=list)

    @cached_property
    def examine(self) -> list[str]:
        if len(self.fillers) < SHORTEST_SPLIT_LIST:
            return []
        return [filler for filler in self.fillers if held_out(self.name, filler)]

    @cached_property
    def train(self) -> list[str]:
        examine = set(self.examine)
        return [filler for filler in self.fillers if filler not in examine]


@dataclass
class Intent:
    """One way a subject comes up, with the phrasings people use for it and the replies that fit all of them."""

    name: str
    description: str
    where: str
    phrasings: list[Line] = field(default_factory=list)
    replies: list[Line] = field(default_factory=list)


@dataclass
class Topic:
    """One topic file."""

    name: str
    description: str
    path: Path
    marks: list[str] = field(default_factory=list)
    lists: dict[str, WordList] = field(default_factory=dict)
    asides: list[Line] = field(default_factory=list)
    intents: dict[str, Intent] = field(default_factory=dict)

    @cached_property
    def mark_pattern(self) -> re.Pattern[str]:
        """Matches the words by which a reply shows that it is about this topic."""
        words = (re.escape(mark).replace(r"\*", r"[\w'-]*") for mark in sorted(self.marks, key=len, reverse=True))
        return re.compile(rf"(?<![\w'-])(?:{'|'.join(words)})(?![\w'-])", re.IGNORECASE)

    def is_about(self, reply: str) -> bool:
        """Whether `reply` uses a word of this topic."""
        return self.mark_pattern.search(reply) is not None


@dataclass
class Character:
    """All that is known of one fish: its topics and the words they share."""

    name: str
    path: Path
    words: dict[str, WordList]
    topics: dict[str, Topic]

    def word_list(self, topic: Topic, name: str) -> WordList:
        """The list that `{name}` means in `topic`."""
        return topic.lists[name] if name in topic.lists else self.words[name]


class Chooser:
    """Fills slots for one conversation: the same slot always gets the same filler, numbered ones differ."""

    def __init__(self, character: Character, topic: Topic, rng: random.Random, *, examine: bool = False) -> None:
        self._character, self._topic, self._rng, self._examine = character, topic, rng, examine
        self._chosen: dict[tuple[str, str], str] = {}

    def __call__(self, name: str, index: str = "") -> str:
        key = (name, index)
        if key not in self._chosen:
            words = self._character.word_list(self._topic, name)
            fillers = (words.examine if self._examine else None) or words.train
            taken = {filler for (other, _), filler in self._chosen.items() if other == name}
            free = [filler for filler in fillers if filler not in taken] if taken else fillers
            # An examined list may hold too few for a second, different filler.
            self._chosen[key] = self._rng.choice(free or [filler for filler in words.train if filler not in taken])
        return self._chosen[key]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, stripped line) for each line of the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CharacterError(f"{path} is missing.") from None
    except UnicodeDecodeError as error:
        raise CharacterError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    for number, line in enumerate(text.splitlines(), 1):
        yield f"{path.name}:{number}", line.strip()


def _add_fillers(words: WordList, line: str, where: str) -> None:
    for filler in line.rstrip(",").split(","):
        filler = filler.strip()
        if not filler or "{" in filler or "}" in filler:
            raise CharacterError(f"{where}: list '{words.name}' has an empty filler or one with a brace.")
        if filler not in words.fillers:
            words.fillers.append(filler)


def _new_list(line: str, where: str, lists: dict[str, WordList]) -> WordList:
    name = line[1:].split("#")[0].strip()
    if not _NAME.fullmatch(name):
        raise CharacterError(f"{where}: '{name}' is no name for a word list; use small letters and underscores.")
    if name in lists:
        raise CharacterError(f"{where}: the word list '{name}' stands twice; the first is at {lists[name].where}.")
    lists[name] = WordList(name, where)
    return lists[name]


def read_words(path: Path) -> dict[str, WordList]:
    """The word lists of a `words.txt`, by name."""
    lists: dict[str, WordList] = {}
    current: WordList | None = None
    for where, line in _lines(path):
        if not line:
            current = None
        elif line.startswith("#"):
            continue
        elif line.startswith("="):
            current = _new_list(line, where, lists)
        elif current:
            _add_fillers(current, line, where)
        else:
            raise CharacterError(f"{where}: words outside a list; begin one with '= name'.")
    return lists


def read_topic(path: Path) -> Topic:
    """One topic file. Errors name file and line."""
    topic = Topic(path.stem, "", path)
    intent: Intent | None = None
    words: WordList | None = None
    for where, line in _lines(path):
        sign, rest = line[:1], line[1:].strip()
        if words and line and sign not in "#=[>+@":
            _add_fillers(words, line, where)
            continue
        words = None
        if not line:
            continue
        if sign == "#":
            topic.description = topic.description or rest
        elif sign == "@":
            topic.marks += [mark.strip().lower() for mark in rest.rstrip(",").split(",") if mark.strip()]
        elif sign == "=":
            words = _new_list(line, where, topic.lists)
        elif sign == "[":
            name, closed, description = line[1:].partition("]")
            if not closed or not _NAME.fullmatch(name):
                raise CharacterError(
                    f"{where}: an intent begins with its name in brackets, as in '[hungry] asked ...'."
                )
            if name not in topic.intents:
                topic.intents[name] = Intent(name, description.strip(), where)
            elif description.strip() not in ("", topic.intents[name].description):
                raise CharacterError(f"{where}: the intent '{name}' stands twice, with two descriptions.")
            intent = topic.intents[name]
        elif sign == "+":
            topic.asides.append(Line(rest, where))
        elif sign in ">-":
            if intent is None:
                raise CharacterError(f"{where}: a line for nobody; begin an intent with '[name]' first.")
            (intent.phrasings if sign == ">" else intent.replies).append(Line(rest, where))
        else:
            raise CharacterError(f"{where}: a line begins with one of # @ = [ > - + (this one with '{sign}').")
    return topic


def _check(character: Character) -> None:
    """Everything that can be wrong between lines: unknown slots, empty lists, templates that can never be used."""
    for shared in character.words.values():
        if not shared.fillers:
            raise CharacterError(f"{shared.where}: the word list '{shared.name}' is empty.")
    for topic in character.topics.values():
        if not topic.intents:
            raise CharacterError(f"{topic.path.name}:1: the topic has no intent; add '[name]' with '>' and '-' lines.")
        if not topic.marks:
            raise CharacterError(f"{topic.path.name}:1: the topic has no '@' line with the words its replies use.")
        used: set[str] = set()
        intents = topic.intents.values()
        for intent in intents:
            if not intent.phrasings or not intent.replies:
                missing = "reply ('- ...')" if intent.phrasings else "phrasing ('> ...')"
                raise CharacterError(
                    f"{intent.where}: the intent '{intent.name}' has no {missing}, so it is never used."
                )
        lines = [*topic.asides, *(line for intent in intents for line in [*intent.phrasings, *intent.replies])]
        for line in lines:
            if not line.text:
                raise CharacterError(f"{line.where}: an empty line; write the text behind the sign.")
            if "{" in (rest := _SLOT.sub("", line.text)) or "}" in rest:
                raise CharacterError(f"{line.where}: a brace without a partner, or a slot with a bad name.")
            for name, index in line.slots:
                used.add(name)
                if name not in topic.lists and name not in character.words:
                    raise CharacterError(f"{line.where}: unknown slot '{{{name}}}'; no list has that name.")
                if len(character.word_list(topic, name).train) < int(index or 1):
                    raise CharacterError(f"{line.where}: the word list '{name}' is too short for '{{{name}:{index}}}'.")
        for words in topic.lists.values():
            if not words.fillers:
                raise CharacterError(f"{words.where}: the word list '{words.name}' is empty.")
            if words.name not in used:
                raise CharacterError(f"{words.where}: no line uses the word list '{words.name}'.")
            if words.name in character.words:
                raise CharacterError(f"{words.where}: words.txt has a list '{words.name}' too; choose another name.")


def load_character(name_or_path: str | Path = "guppy", *, topics: list[str] | None = None) -> Character:
    """Read a character: one that ships (`"guppy"`) or a folder of your own.

    `topics` reads only some of them. Raises CharacterError, naming file and line.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        path = CHARACTERS / name_or_path
    if not path.is_dir():
        shipped = ", ".join(sorted(folder.name for folder in CHARACTERS.iterdir() if folder.is_dir()))
        raise CharacterError(
            f"There is no character '{name_or_path}': not a folder, and none of those that ship ({shipped})."
        )
    files = sorted((path / "topics").glob("*.txt"))
    if topics is not None:
        files = [path / "topics" / f"{topic}.txt" for topic in topics]
    if not files:
        raise CharacterError(f"{path / 'topics'} has no topic file (*.txt).")
    character = Character(
        path.name, path, read_words(path / "words.txt"), {file.stem: read_topic(file) for file in files}
    )
    _check(character)
    return character
