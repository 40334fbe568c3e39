"""The linear floor: it learns what words alone can tell."""

from __future__ import annotations

from guppylm.baseline import LinearBaseline, features

PROMPTS = [
    "are you hungry",
    "do you want food",
    "is your belly empty",
    "is the lamp on",
    "so bright here",
    "turn it off",
]
TOPICS = ["food", "food", "food", "light", "light", "light"]


def test_it_names_topics_by_pieces_of_words() -> None:
    floor = LinearBaseline(PROMPTS * 10, TOPICS * 10)
    assert floor.topics(["ARE YOU HUNGRYY", "foood?", "it's brighter", "the lamps"]) == [
        "food",
        "food",
        "light",
        "light",
    ]


def test_same_seed_same_floor() -> None:
    unseen = ["what is a trombone", "hi", "water", ""]
    assert LinearBaseline(PROMPTS, TOPICS).topics(unseen) == LinearBaseline(PROMPTS, TOPICS).topics(unseen)


def test_a_prompt_without_words_has_features_too() -> None:
    assert features("") == features("?!") == [0]
    assert len(features("hungry")) > 5
