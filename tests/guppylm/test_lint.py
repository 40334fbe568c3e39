"""The voice of a reply: what passes, what is named."""

from __future__ import annotations

import pytest

from guppylm.datagen.grammar import load_character
from guppylm.datagen.lint import lint_topic, style_fault


@pytest.mark.parametrize(
    "reply",
    ["yes. i am always hungry.", "what is a car. does it float?", "i don't know, maybe it's wet.", "blub blub.",
     "the shape in front of you is me.", "does it like flakes."],
)  # fmt: skip
def test_the_voice_passes(reply: str) -> None:
    assert style_fault(reply) is None


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("Yes.", "capital"),
        ("i have 2 fins.", "'2'"),
        ("no!", "'!'"),
        ("i am here", "end"),
        ("i am  here.", "stray"),
        ("my mouth are happy.", "agreement"),
        ("my gills is open.", "agreement"),
        ("i saw a apple.", "agreement"),
        ("the the water is nice.", "doubles"),
        ("", "end"),
        ("water " * 41 + "yes.", "more than 40"),
    ],
)
def test_a_fault_is_named(reply: str, fault: str) -> None:
    assert fault in (style_fault(reply) or "")


def test_every_line_guppy_says_keeps_to_the_voice() -> None:
    """Every topic file, each slot with each of its fillers."""
    character = load_character("guppy")
    faults = [fault for topic in character.topics.values() for fault in lint_topic(character, topic)]
    assert not faults, "\n".join(faults[:20])
