"""The model card: what a model folder's README.md says about how the fish was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guppylm import __version__

if TYPE_CHECKING:
    from guppylm.recipe import Recipe
    from guppylm.train import Run


def model_card(recipe: Recipe, run: Run, seconds: float) -> str:
    """The card of a finished run that took `seconds` since it was started or last resumed."""
    numbers = "\n".join(
        f"| {section}.{key} | {value} |"
        for section, values in recipe.model_dump().items()
        for key, value in values.items()
    )
    return f"""---
license: mit
language: en
library_name: guppylm
tags: [guppylm, text-generation, fish]
---

# {recipe.data.character}

A language model of {run.model.parameter_count() / 1e6:.1f} million parameters that talks like a small fish.
It answers one message at a time and remembers nothing.

    guppy chat --model THIS_FOLDER

Trained with Guppy {__version__} on {len(run.rows):,} conversations ({len(run.examined):,} more, with other wordings,
were held out) in {run.step:,} steps; {seconds / 60:.0f} minutes on {run.device}.

| recipe | |
|---|---|
{numbers}
"""
