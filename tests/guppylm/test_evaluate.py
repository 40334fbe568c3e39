"""The evaluation page: the same figures as data and for people, and a broken line of the set is named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from guppylm import checkpoint
from guppylm.datagen.grammar import Character, CharacterError, load_character
from guppylm.evaluate import Prompt, as_markdown, evaluate, on_topic, read_prompts

LINES = [
    {"prompt": "is there any food left", "topics": ["food"]},
    {"prompt": "a line\u2028and another | one", "topics": ["food"]},
]


@pytest.fixture
def character(small_character: Character, tmp_path: Path) -> Character:
    """The small character with an evaluation set."""
    folder = Path(shutil.copytree(small_character.path, tmp_path / "nibbles"))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES))
    return load_character(folder)


async def test_the_page_as_data_and_for_people(small_fish: Path, character: Character) -> None:
    page = await evaluate(checkpoint.load(small_fish), character, conversations=400, seed=3)
    listening = page["listening"]["its topics"]
    assert listening["prompts"] == 2
    assert listening["topic thought of"] == 1.0  # he knows one topic only
    assert listening["topic named by the linear baseline"] == 1.0
    assert page["listening"]["small talk"]["reply on topic"] is None
    assert page["speaking"]["markup or thought shown"] == 0
    assert all(math.isfinite(loss) and loss > 0 for loss in page["loss on held-out wordings"].values())
    assert [answer["prompt"] for answer in page["answers"]] == [line["prompt"] for line in LINES]
    assert all(answer["reply"] for answer in page["answers"])
    assert json.loads(json.dumps(page, allow_nan=False)) == page

    page["replies"]["hi guppy"] = "a | b\nc"
    text = as_markdown(page)
    assert "| | its topics (2 prompts) | things it can't know (0 prompts) | small talk (0 prompts) |" in text
    assert "| topic thought of | 100.0 % | – | – |" in text
    assert "| hi guppy | a \\| b c |" in text
    for table in text.split("\n\n"):
        rows = [row.replace("\\|", "").count("|") for row in table.splitlines() if row.startswith("|")]
        assert len(set(rows)) <= 1, table


async def test_the_same_seed_gives_the_same_page(small_fish: Path, character: Character) -> None:
    pages = [
        await evaluate(checkpoint.load(small_fish), character, conversations=200, seed=1, baseline=False)
        for _ in range(2)
    ]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    "line",
    ["{", '{"prompt": "hi"}', '{"prompt": 3, "topics": ["food"]}', '{"prompt": "hi", "topics": "food"}',
     '{"prompt": "hi", "topics": []}', '{"prompt": "hi", "topics": ["cheese"]}', "[]", ""],
)  # fmt: skip
def test_a_broken_line_is_named(character: Character, line: str) -> None:
    path = character.path / "evaluation.jsonl"
    path.write_text(json.dumps(LINES[0]) + f"\n{line}\n" + json.dumps(LINES[0]) + "\n")
    with pytest.raises(CharacterError, match=r"evaluation\.jsonl:2: "):
        read_prompts(character)


def test_a_missing_set_is_named(small_character: Character) -> None:
    with pytest.raises(CharacterError, match=r"evaluation\.jsonl is missing"):
        read_prompts(small_character)


def test_the_set_that_ships_is_right() -> None:
    prompts = read_prompts(load_character("guppy"))
    assert len(prompts) >= 500
    assert {prompt.kind for prompt in prompts} == {"its topics", "small talk", "things it can't know"}
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)


def test_a_reply_may_be_about_any_topic_the_prompt_is_about(small_character: Character) -> None:
    assert on_topic(small_character, Prompt("hi", ["food"]), "i am eating.")
    assert not on_topic(small_character, Prompt("hi", ["food"]), "it is cold.")
