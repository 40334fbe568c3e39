"""A recipe: every number of a training run, read from a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

RECIPES = Path(__file__).parent.parent / "training" / "recipes"


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the file and the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """Which conversations to compose."""

    character: str = "guppy"
    conversations: int = Field(default=60_000, ge=100)
    seed: int = 1


class TokenizerSize(_Section):
    """How many tokens there are."""

    vocab_size: int = Field(default=4096, ge=300, le=32_768)


class Shape(_Section):
    """The shape of the model; names as in config.json."""

    hidden_size: int = Field(default=384, ge=8)
    num_hidden_layers: int = Field(default=6, ge=1)
    num_attention_heads: int = Field(default=6, ge=1)
    intermediate_size: int = Field(default=768, ge=8)
    max_position_embeddings: int = Field(default=128, ge=96, le=1024)
    hidden_dropout_prob: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_are_equally_wide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads cannot share hidden_size {self.hidden_size} evenly")
        return self


class Train(_Section):
    """The loop. Shares are of the steps, weights are of the loss. `start_from`: the model whose weights to begin with;
    without one, from nothing."""

    seed: int = 1
    start_from: str | None = None
    steps: int = Field(ge=1)
    batch_tokens: int = Field(default=2048, ge=128)
    only_listening: float = Field(default=0.35, ge=0, le=1)
    short: int = Field(default=18, ge=1)
    listening: float = Field(default=0.4, ge=0, le=1)
    guess_weight: float = Field(default=0.3, ge=0)
    thought_weight: float = Field(default=4.0, ge=0)
    reply_weight: float = Field(default=1.0, ge=0)
    matrix_rate: float = Field(default=4e-3, gt=0)
    learning_rate: float = Field(default=4e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    decay: float = Field(default=0.5, ge=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)


class Recipe(_Section):
    """A whole run. Unknown keys are errors."""

    data: Data = Data()
    tokenizer: TokenizerSize = TokenizerSize()
    model: Shape = Shape()
    train: Train


def load_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by name (`guppy`, from training/recipes) or path; `overrides` are "section.key=value".

    Raises RecipeError.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise RecipeError(f"There is no recipe '{name_or_path}': not a file, and none of {known}.")
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML file: {error}.") from None
    for override in overrides or []:
        key, given, value = override.partition("=")
        section, dot, field = key.strip().partition(".")
        if not given or not dot:
            raise RecipeError(f"--set {override}: write it as section.key=value, for example train.steps=500.")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()
        values.setdefault(section, {})
        if not isinstance(values[section], dict):
            raise RecipeError(f"--set {override}: '{section}' is no section.")
        values[section][field] = parsed
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
