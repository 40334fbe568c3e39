"""The tokenizer: byte-level BPE. Text in, ids out, and back without loss.

It begins with the 256 bytes, so any Unicode text can be written, and merges the most frequent neighbours until the
vocabulary is full. Ids 0 to 2 are padding and the chat markup (the public GuppyLM's), then come the thoughts, then
bytes and merges.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from guppylm.conversation import IM_END_TOKEN, IM_START_TOKEN, PAD_TOKEN, hear, intent_token, topic_token


def special_tokens(thoughts: dict[str, list[str]]) -> list[str]:
    """All tokens that no text can produce, in the order of their ids."""
    topics = [topic_token(topic) for topic in thoughts]
    intents = [intent_token(topic, intent) for topic, names in thoughts.items() for intent in names]
    return [PAD_TOKEN, IM_START_TOKEN, IM_END_TOKEN, *topics, *intents]


def train_tokenizer(
    prompts: Iterable[str], replies: Iterable[str], thoughts: dict[str, list[str]], vocab_size: int
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids, trained on training text only (as Guppy hears it).

    Raises ValueError when `vocab_size` does not even hold the 256 bytes and the special tokens.
    """
    specials = special_tokens(thoughts)
    if vocab_size < 256 + len(specials):
        needed = 256 + len(specials)
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} special tokens, {needed}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    markup = ["user\n", "assistant\n", "\n"]
    texts = (text for source in (markup * 1000, map(hear, prompts), replies) for text in source)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
