"""The fixed texts are complete, fit their places and stay in character: `bot/voice.py` and `bot/messages/`."""

import re
import tomllib
from importlib.resources import files

import pytest

from bot import voice
from bot.fish import Asleep, Busy, Confused
from bot.limits import Verdict

ENGLISH = tomllib.loads((files("bot") / "messages" / "en.toml").read_text("utf-8"))
LANGUAGES = voice.languages()
CHAT_LINES = [key for key, text in ENGLISH.items() if isinstance(text, list)]


def test_english_is_there_first_and_not_alone() -> None:
    assert LANGUAGES[0] == "en"
    assert len(LANGUAGES) > 1


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("key", ENGLISH)
def test_every_language_has_every_text_with_the_same_slots(language: str, key: str) -> None:
    def slots(text: str) -> set[str]:
        return set(re.findall(r"{(\w+)}", text))

    english = set().union(*map(slots, voice.variants(key)))
    for text in voice.variants(key, language):
        assert text.strip()
        assert slots(text) == english


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_language_has_a_text_that_english_lacks(language: str) -> None:
    assert set(voice._texts(language)) <= set(ENGLISH)


def test_every_trouble_has_a_line() -> None:
    for error in (Asleep, Busy, Confused):
        assert voice.say(error.line)
    for verdict in (Verdict.TOO_FAST, Verdict.STILL_THINKING):
        assert voice.say(verdict.value)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("key", CHAT_LINES)
def test_a_chat_line_speaks_like_the_fish(language: str, key: str) -> None:
    for line in voice.variants(key, language):
        assert line == line.lower()
        assert len(line) <= 120
        assert line.endswith(".")
        assert not re.search(r"[!@<>*_`\n]|http", line)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_fit_where_the_platforms_show_them(language: str) -> None:
    for key in ENGLISH:
        longest = max(map(len, voice.variants(key, language)))
        if key.startswith("describe_"):
            assert longest <= 100, "Discord's limit for a command's description"
        elif key == "bot_short_description":
            assert longest <= 120, "Telegram's limit"
        elif key == "bot_description":
            assert longest <= 512, "Telegram's limit"
        elif key == "presence":
            assert longest <= 128, "Discord's limit"
        else:
            assert longest <= 2000, "Discord's limit for a message"
    assert len(voice.say("describe_ask_guppy", language)) <= 32, "Discord's limit for a menu entry"


@pytest.mark.parametrize(("locale", "language"), [("de", "de"), ("de-AT", "de"), ("de_CH", "de"), ("DE", "de")])
def test_a_locale_finds_its_language(locale: str, language: str) -> None:
    assert voice.variants("asleep", locale) == voice._texts(language)["asleep"]


@pytest.mark.parametrize("locale", [None, "", "en-US", "xx", "../../etc/passwd", "zh-Hant-TW"])
def test_any_other_locale_gets_english(locale: str | None) -> None:
    assert voice.variants("asleep", locale) == ENGLISH["asleep"]


def test_variants_vary() -> None:
    assert len({voice.say("asleep") for _ in range(100)}) == len(ENGLISH["asleep"])


def test_slots_are_filled() -> None:
    assert voice.say("help_telegram", mentions=" x.", name="y").count(" x.") == 1


def test_a_key_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError):
        voice.say("no_such_text")
