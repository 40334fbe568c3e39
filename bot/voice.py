"""What Guppy says when the model does not speak for him: every fixed text of the service, in character.

The texts are data: `messages/<language>.toml`, one table of them, English complete, the others as far as they go.
A text may have several variants (a list); one of them is picked at random, so that a fish doesn't sound like a machine.
"""

import random
import tomllib
from functools import cache
from importlib.resources import files

FALLBACK = "en"


@cache
def _texts(language: str) -> dict[str, list[str]]:
    table = tomllib.loads((files("bot") / "messages" / f"{language}.toml").read_text("utf-8"))
    return {key: [text] if isinstance(text, str) else text for key, text in table.items()}


@cache
def languages() -> tuple[str, ...]:
    """The languages with texts of their own, English first."""
    names = [file.name for file in (files("bot") / "messages").iterdir() if file.name.endswith(".toml")]
    return tuple(sorted((name.removesuffix(".toml") for name in names), key=lambda name: (name != FALLBACK, name)))


def variants(key: str, locale: str | None = None) -> list[str]:
    """All variants of the text `key` in the language of `locale` ("de", "de-AT", "de_AT"), or in English.

    Raises KeyError for a key that English doesn't have.
    """
    language = (locale or FALLBACK).replace("_", "-").split("-")[0].lower()
    if language in languages() and key in _texts(language):
        return _texts(language)[key]
    return _texts(FALLBACK)[key]


def say(key: str, locale: str | None = None, **slots: str) -> str:
    """One variant of the text `key`, with its `{slots}` filled. Errors as `variants`."""
    return random.choice(variants(key, locale)).format(**slots)
