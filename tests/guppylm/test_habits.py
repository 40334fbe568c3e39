"""How people type: it varies, and it stays what was said."""

from __future__ import annotations

import random

from guppylm.datagen.dataset import normalised
from guppylm.datagen.habits import as_typed


def test_one_phrasing_is_typed_in_many_ways() -> None:
    typed = {as_typed("what do you think about the new plant", random.Random(seed)) for seed in range(500)}
    assert len(typed) > 150
    assert "what do you think about the new plant" in typed
    assert any(text.isupper() for text in typed)
    assert any(text.endswith("?") for text in typed)


def test_most_words_survive() -> None:
    """Typing habits never change what is meant: the words are still there, give or take a slip."""
    phrasing = "what do you think about the new plant"
    words = set(phrasing.split())
    typed = [normalised(as_typed(phrasing, random.Random(seed))).split() for seed in range(300)]
    kept = [len(words & set(text)) for text in typed]
    assert sum(kept) / len(kept) > 0.85 * len(words)


def test_same_draws_same_text() -> None:
    assert as_typed("are you hungry", random.Random(7)) == as_typed("are you hungry", random.Random(7))
