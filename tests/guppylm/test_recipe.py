"""Recipes: every number is checked before a run begins, and a wrong one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from guppylm.recipe import RECIPES, RecipeError, load_recipe


@pytest.mark.parametrize("name", [path.stem for path in RECIPES.glob("*.toml")])
def test_the_recipes_that_ship_are_right(name: str) -> None:
    assert load_recipe(name).train.steps > 0


def test_set_changes_numbers(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text("[train]\nsteps = 10\nlistening = 0.25\n")
    recipe = load_recipe(path, ["train.steps=500", "data.character=shark", "model.hidden_size = 36"])
    assert (recipe.train.steps, recipe.train.listening) == (500, 0.25)
    assert recipe.data.character == "shark"
    assert recipe.model.hidden_size == 36


@pytest.mark.parametrize(
    ("text", "override", "complaint"),
    [
        ("", None, "train: Field required"),
        ("[train]\nstep = 1\n", None, "train.steps"),
        ("[train]\nsteps = 1\nspeed = 2\n", None, "train.speed: Extra"),
        ("[pond]\n[train]\nsteps = 1\n", None, "pond: Extra"),
        ("[train]\nsteps = 0\n", None, "train.steps: .* greater than or equal to 1"),
        ("[train]\nsteps = 'many'\n", None, "train.steps: .* integer"),
        ("[train\n", None, "is no TOML file"),
        ("[train]\nsteps = 1\n", "steps=3", "section.key=value"),
        ("[train]\nsteps = 1\n", "train.steps", "section.key=value"),
        ("[train]\nsteps = 1\n", "train.steps=fast", "train.steps: .* integer"),
        ("[train]\nsteps = 1\n", "model.num_attention_heads=5", "5 heads cannot share hidden_size 384"),
        ("train = 3\n", "train.steps=3", "'train' is no section"),
    ],
)
def test_a_wrong_number_is_named(tmp_path: Path, text: str, override: str | None, complaint: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(path, [override] if override else None)


def test_an_unknown_recipe_names_those_that_ship() -> None:
    with pytest.raises(RecipeError, match=r"'fast'.*guppy"):
        load_recipe("fast")
