"""A small fish, trained in seconds, for tests that need one of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guppylm import checkpoint
from guppylm.card import model_card
from guppylm.datagen.dataset import compose
from guppylm.datagen.grammar import Character, load_character
from guppylm.recipe import Recipe
from guppylm.train import Run

# So small a fish is no work for two: threads would only wait for each other.
torch.set_num_threads(1)

TOPIC = """\
# Food: hunger.
@ food, hungry, eat*, crumb*

= fruit
apple, banana, kiwi, orange

+ a crumb would be nice.

[hungry] asked whether he is hungry
> are you hungry
> do you want food
> is your belly empty
- yes. i am always hungry.
- i could eat a {fruit}.

[fruit] told about fruit
> i ate a {fruit}
> my {relative} bought a {fruit} and a {fruit:2}
- a {fruit}. i would eat a {fruit}.
"""

TINY = {
    "data": {"conversations": 400},
    "tokenizer": {"vocab_size": 420},
    "model": {"hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 40},
    "train": {"steps": 20, "batch_tokens": 256},
}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate(TINY)


@pytest.fixture(scope="session")
def small_character(tmp_path_factory: pytest.TempPathFactory) -> Character:
    """A character of one topic."""
    folder = tmp_path_factory.mktemp("character") / "nibbles"
    (folder / "topics").mkdir(parents=True)
    (folder / "words.txt").write_text("= relative\nmom, dad, aunt\n")
    (folder / "topics" / "food.txt").write_text(TOPIC)
    return load_character(folder)


@pytest.fixture(scope="session")
def small_fish(tmp_path_factory: pytest.TempPathFactory, small_character: Character) -> Path:
    """A model folder, odd numbers of heads and layers, 20 steps old."""
    out = tmp_path_factory.mktemp("runs") / "nibbles"
    recipe = Recipe.model_validate(TINY)
    train, _ = compose(small_character, 400, seed=1)
    run = Run(recipe, train, train[:20], out, device=torch.device("cpu"))
    for _ in run.train():
        pass
    checkpoint.save(out, run.model, run.tokenizer, model_card(recipe, run, 1.0), torch.float32)
    return out
