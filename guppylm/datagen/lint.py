"""Checks the writing: does every line a person or the fish says keep to the voice?

`python -m guppylm.datagen.lint [TOPIC ...]` reads topic files and prints what to mend, with file and line. The
grammar itself (slots, lists, braces) is checked while reading; here are the rules of language.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise

from guppylm.datagen.grammar import Character, CharacterError, Line, Topic, load_character

LONGEST_REPLY = 40  # words, with its aside

_REPLY = re.compile(r"(?:[a-z]+(?:['-][a-z]+)*'?[.,?]? )*[a-z]+(?:['-][a-z]+)*[.?]")
# Doubled words that are right now and then.
_MAY_DOUBLE = frozenset(
    "hi hello that had very so blub bye no ha glub tap round swim nom la hum".split()  # noqa: SIM905
)
_AGREEMENT = re.compile(
    r"\b(?:i (?:is|are|has|does|wants|likes)\b|(?:he|she|it) (?:are|am|have|do|want|like)\b(?<!did it like)"
    r"|(?:you|we|they) (?:is|am|was|has|does)\b"
    r"|my (?:mouth|tail|belly|body|nose) (?:are|were|have|feel)\b|my (?:fins|gills|eyes|scales) (?:is|was|has|feels)\b"
    r"|an [bcdfgjklmnpqrstvwxyz][a-z]|a (?:apple|egg|empty|eel|old|ice|open|other|idea|eye|ocean|end"
    r"|hour|orange|island)\b)"
)
# "does it like", "the water around it like ...": a verb in front makes the bare form right.
_HELPED = re.compile(
    r"\b(?:do|does|did|can|could|will|would|might|may|must|should|let|make|makes|made|see|hear|help|if) $"
)
# Where "you was", "they is" and the like follow a noun phrase that ends there ("the shape in front of you is").
_OF = re.compile(
    r"\b(?:of|like|with|to|for|near|about|around|behind|by|from|than|on|at|and|over|under"
    r"|in|between|see|saw|after|before|without|next to) $"
)


def style_fault(reply: str) -> str | None:
    """What is wrong with the reply's style, or None.

    The voice: lowercase, no digits, letters and . , ? ' - only, at most 40 words, ends with a full stop or a question
    mark, no doubled word, subject and verb agree, "a" and "an" are right.
    """
    if not _REPLY.fullmatch(reply):
        if reply != reply.lower():
            return "has a capital letter"
        if odd := re.search(r"[^a-z .,?'-]", reply):
            return f"has the character {odd[0]!r}"
        if not reply.endswith((".", "?")):
            return "does not end with a full stop or a question mark"
        return "has stray spaces or punctuation"
    words = re.findall(r"[a-z'-]+|[.?,]", reply)
    if sum(word[0].isalpha() for word in words) > LONGEST_REPLY:
        return f"has more than {LONGEST_REPLY} words"
    for word, after in pairwise(words):
        if word == after and word.isalpha() and word not in _MAY_DOUBLE:
            return f"doubles the word '{word}'"
    for match in _AGREEMENT.finditer(reply):
        before = reply[: match.start()]
        is_article = match[0].startswith(("a ", "an "))
        if not is_article and (_HELPED.search(before) or _OF.search(before)):
            continue
        return f"agreement: '{match[0]}'"
    return None


def _samples(character: Character, topic: Topic, line: Line) -> Iterator[str]:
    """The line with each of its lists' fillers in turn (other slots get their first filler)."""
    lists = {name: character.word_list(topic, name).fillers for name, _ in line.slots}
    for turn in range(max([len(fillers) for fillers in lists.values()], default=1)):

        def choose(name: str, index: str, turn: int = turn) -> str:
            return lists[name][(turn + int(index or 1) - 1) % len(lists[name])]

        yield line.fill(choose)


def lint_topic(character: Character, topic: Topic) -> Iterator[str]:
    """Every fault of a topic as one printable line."""
    seen: dict[str, str] = {}
    for intent in topic.intents.values():
        said = [set(line.slots) for line in intent.phrasings]
        for line in intent.phrasings:
            text = line.text
            if text in seen:
                yield f"{line.where}: the same phrasing stands at {seen[text]}: {text}"
            seen.setdefault(text, line.where)
            if text.endswith((".", "?", "!", ",")) and len(text) > 3:
                yield f"{line.where}: a phrasing ends without punctuation (it is added by code): {text}"
            if any(char.isupper() for char in _without_slots(text)):
                yield f"{line.where}: a phrasing is lowercase: {text}"
        echoed = {slot for line in intent.replies for slot in line.slots if slot[0] in topic.lists}
        for name, index in sorted(echoed):
            with_slot = sum((name, index) in slots for slots in said)
            if 0 < with_slot < len(said):
                yield (
                    f"{intent.where}: replies of '{intent.name}' use {{{name}}}, which only {with_slot} of {len(said)} "
                    f"phrasings say; use another list or move these phrasings to an intent of their own"
                )
        for line in intent.replies:
            seen_reply = f"- {line.text}"
            if seen_reply in seen:
                yield f"{line.where}: the same reply stands at {seen[seen_reply]}: {line.text}"
            seen.setdefault(seen_reply, line.where)
            for sample in _samples(character, topic, line):
                if fault := style_fault(sample):
                    yield f"{line.where}: the reply {fault}: {sample}"
                    break
                if not topic.is_about(sample):
                    yield f"{line.where}: the reply has none of the topic's @ words: {sample}"
                    break
    for line in topic.asides:
        for sample in _samples(character, topic, line):
            if fault := style_fault(sample):
                yield f"{line.where}: the aside {fault}: {sample}"
                break


def _without_slots(text: str) -> str:
    return re.sub(r"\{[^}]*\}", "", text)


def main(names: list[str]) -> int:
    """Lint the named topics of Guppy (all when none is named); returns the exit code."""
    faults = 0
    try:
        character = load_character("guppy", topics=names or None)
    except CharacterError as error:
        print(error)
        return 1
    for topic in character.topics.values():
        for fault in lint_topic(character, topic):
            print(fault)
            faults += 1
        phrasings = sum(len(intent.phrasings) for intent in topic.intents.values())
        replies = sum(len(intent.replies) for intent in topic.intents.values())
        counts = f"{phrasings} phrasings, {replies} replies, {len(topic.intents)} intents, {len(topic.asides)} asides"
        print(f"{topic.name}: {counts}")
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
