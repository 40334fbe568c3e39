"""The data set: what 60,000 conversations of Guppy must be."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from guppylm.datagen.dataset import Composer, Conversation, compose, normalised, read_jsonl, report, write_jsonl
from guppylm.datagen.grammar import Character, load_character

TOPICS = """greeting feeling temp_hot temp_cold food light water about confused tank noise night lonely misc bye bubbles
glass reflection breathing swimming colors taste plants filter algae snail glass_tap scared excited bored curious happy
tired outside cat rain seasons music visitors children meaning time memory dreams size future past name weather sleep
friends joke fear love age smart poop doctor singing tv""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def guppy() -> Character:
    return load_character("guppy")


@pytest.fixture(scope="module")
def data(guppy: Character) -> tuple[list[Conversation], list[Conversation]]:
    return compose(guppy, 60_000, seed=1)


def test_all_sixty_topics_are_there(guppy: Character) -> None:
    assert sorted(guppy.topics) == sorted(TOPICS)


def test_words_are_many(guppy: Character) -> None:
    assert len(guppy.words["tank_object"].fillers) >= 30
    assert len(guppy.words["foods"].fillers) >= 17
    assert len(guppy.words["activity"].fillers) >= 25


def test_each_topic_has_a_thousand_phrasings(guppy: Character) -> None:
    few = {
        topic.name: count
        for topic in guppy.topics.values()
        if (count := len({line.text for intent in topic.intents.values() for line in intent.phrasings})) < 1000
    }
    assert not few


def test_sixty_thousand_conversations_are_varied(data: tuple[list[Conversation], list[Conversation]]) -> None:
    facts = report(*data)
    assert facts["conversations"] == 60_000
    assert facts["distinct prompts"] >= 30_000
    assert facts["distinct replies"] >= 40_000
    assert facts["prompts in both"] == 0
    assert facts["replies with a fault of style"] == 0
    for name, topic in facts["topics"].items():
        assert topic["distinct prompts"] >= 300, name
        assert topic["distinct replies"] >= 400, name
        assert topic["most frequent reply"] <= 0.01, name


def test_no_wording_stands_in_both_parts(data: tuple[list[Conversation], list[Conversation]]) -> None:
    train, held_out = data
    assert not {(c.topic, c.wording) for c in train} & {(c.topic, c.wording) for c in held_out}
    assert not {normalised(c.prompt) for c in train} & {normalised(c.prompt) for c in held_out}


def test_same_seed_same_bytes(small_character: Character, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_jsonl(tmp_path / name, compose(small_character, 400, seed)[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_rows_are_read_back_and_a_bad_one_is_named(small_character: Character, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    conversations = list(islice(iter(Composer(small_character, 1)), 50))
    write_jsonl(path, conversations)
    assert [c.row() for c in read_jsonl(path)] == [c.row() for c in conversations]
    path.write_text(path.read_text() + '{"input": "hi"}\n')
    with pytest.raises(ValueError, match="51"):
        read_jsonl(path)


def test_phrasings_are_dealt_evenly(small_character: Character) -> None:
    """Each phrasing comes as often as any other, give or take one: none is wasted."""
    composer = Composer(small_character, 1)
    wordings = Counter(conversation.wording for conversation in islice(iter(composer), 500))
    assert max(wordings.values()) - min(wordings.values()) <= 1
