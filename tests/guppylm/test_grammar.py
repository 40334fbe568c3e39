"""Character files: what they mean, and what a writer hears when something is wrong in one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from guppylm.datagen.grammar import Character, CharacterError, Chooser, article, held_out, load_character

GOOD = "# Food.\n@ food\n[ask] asked\n> is there food\n- yes. food.\n"


def character(folder: Path, topic: str, words: str = "= relative\nmom, dad\n") -> Character:
    (folder / "topics").mkdir(exist_ok=True)
    (folder / "words.txt").write_text(words)
    (folder / "topics" / "food.txt").write_text(topic)
    return load_character(folder)


def test_a_slot_has_one_filler_in_phrasing_and_reply(small_character: Character) -> None:
    topic = small_character.topics["food"]
    intent = topic.intents["fruit"]
    for seed in range(20):
        choose = Chooser(small_character, topic, random.Random(seed))
        said = intent.phrasings[0].fill(choose)
        answered = intent.replies[0].fill(choose)
        fruit = said.split()[-1]
        assert answered == f"{article(fruit)} {fruit}. i would eat {article(fruit)} {fruit}."


def test_numbered_slots_differ(small_character: Character) -> None:
    topic = small_character.topics["food"]
    for seed in range(20):
        choose = Chooser(small_character, topic, random.Random(seed))
        assert choose("fruit") != choose("fruit", "2")


@pytest.mark.parametrize(
    ("filler", "expected"),
    [("apple", "an"), ("banana", "a"), ("hour", "an"), ("unicorn", "a"), ("umbrella", "an"), ("ukulele", "a"),
     ("euro", "a"), ("one way ticket", "a"), ("x-ray", "an"), ("uncle", "an"), ("used car", "a"),
     ("uninvited guest", "an")],
)  # fmt: skip
def test_the_article_follows_the_sound(filler: str, expected: str) -> None:
    assert article(filler) == expected


@pytest.mark.parametrize(
    ("topic", "complaint"),
    [
        (GOOD + "> do you like {cheese}\n", "food.txt:6: unknown slot '{cheese}'"),
        (GOOD + "> do you like {cheese\n", "food.txt:6: a brace without a partner"),
        ("= cheese\n\n" + GOOD, "food.txt:1: the word list 'cheese' is empty"),
        ("= cheese\nbrie\n\n" + GOOD, "food.txt:1: no line uses the word list 'cheese'"),
        ("= relative\nbrie\n\n" + GOOD + "> {relative}\n", "food.txt:1: words.txt has a list 'relative' too"),
        (GOOD + "> my {relative:3} said\n", "food.txt:6: the word list 'relative' is too short"),
        (GOOD + "[offer] offered\n> here is food\n", "food.txt:6: the intent 'offer' has no reply"),
        (GOOD + "[offer] offered\n- thanks for the food.\n", "food.txt:6: the intent 'offer' has no phrasing"),
        ("# Food.\n@ food\n> is there food\n", "food.txt:3: a line for nobody"),
        (GOOD + "so hungry\n", "food.txt:6: a line begins with one of"),
        (GOOD.replace("@ food\n", ""), "food.txt:1: the topic has no '@' line"),
        (GOOD + ">\n", "food.txt:6: an empty line"),
    ],
)
def test_a_mistake_is_named_with_file_and_line(tmp_path: Path, topic: str, complaint: str) -> None:
    with pytest.raises(CharacterError) as caught:
        character(tmp_path, topic)
    assert str(caught.value).startswith(complaint)


def test_an_unknown_character_names_those_that_ship() -> None:
    with pytest.raises(CharacterError, match="guppy"):
        load_character("shark")


def test_a_held_out_wording_stays_held_out_when_lines_are_added(tmp_path: Path) -> None:
    wordings = [f"wording number {n}" for n in range(400)]
    before = [held_out("food", wording) for wording in wordings]
    assert before == [held_out("food", wording) for wording in wordings]
    assert 5 <= sum(before) <= 40


def test_marks_match_whole_words_and_beginnings(tmp_path: Path) -> None:
    topic = character(tmp_path, GOOD.replace("@ food", "@ food, eat*, don't know")).topics["food"]
    assert topic.is_about("i am eating.")
    assert topic.is_about("i don't know.")
    assert not topic.is_about("seafoods and heat.")
