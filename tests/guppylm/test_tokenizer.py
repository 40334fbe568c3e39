"""The tokenizer: every byte has an id, the markup has its places, the words come from the text."""

from __future__ import annotations

import pytest

from guppylm.tokenizer import special_tokens, train_tokenizer

THOUGHTS = {"food": ["hungry", "fruit"], "light": ["lamp"]}
PROMPTS = ["Are you hungry", "are you HUNGRY now", "is the lamp on"] * 3
REPLIES = ["yes. the water is warm.", "the water is fine."] * 3


def test_ids_begin_with_markup_and_thoughts() -> None:
    tokenizer = train_tokenizer(PROMPTS, REPLIES, THOUGHTS, 300)
    names = ["<pad>", "<|im_start|>", "<|im_end|>", "<|food|>", "<|light|>"]
    names += ["<|food.hungry|>", "<|food.fruit|>", "<|light.lamp|>"]
    assert special_tokens(THOUGHTS) == names
    assert [tokenizer.token_to_id(name) for name in names] == list(range(8))


def test_every_byte_can_be_written() -> None:
    tokenizer = train_tokenizer([], [], {}, 259)
    tokenizer.encode_special_tokens = True
    text = "".join(map(chr, range(0x250))) + "水🐟"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_frequent_words_become_tokens_as_guppy_hears_them() -> None:
    tokenizer = train_tokenizer(PROMPTS, REPLIES, THOUGHTS, 320)
    assert tokenizer.encode("are you hungry", add_special_tokens=False).tokens == ["are", "Ġyou", "Ġhungry"]
    assert tokenizer.get_vocab_size() <= 320


def test_same_text_same_tokenizer() -> None:
    first, second = (train_tokenizer(PROMPTS, REPLIES, THOUGHTS, 320).to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size 260 .* 264"):
        train_tokenizer(PROMPTS, REPLIES, THOUGHTS, 260)
