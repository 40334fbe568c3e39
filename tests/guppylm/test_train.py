"""Training: interrupted or not, alone or together, the same fish; and trouble says what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from guppylm import checkpoint
from guppylm import train as training
from guppylm.datagen.dataset import Conversation, compose, write_jsonl
from guppylm.datagen.grammar import Character
from guppylm.evaluate import losses
from guppylm.recipe import Recipe
from guppylm.train import CHECKPOINT, LOG, Rows, Run, TrainError, check_folder, plan, schedule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def conversations(small_character: Character) -> tuple[list[Conversation], list[Conversation]]:
    train, _ = compose(small_character, 400, seed=1)
    return train, train[:20]


@pytest.fixture(scope="module")
def data(
    conversations: tuple[list[Conversation], list[Conversation]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The conversations as files."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", conversations[0])
    write_jsonl(folder / "held_out.jsonl", conversations[1])
    return folder


Data = tuple[list[Conversation], list[Conversation]]


def write_recipe(path: Path, recipe: Recipe, **train: Any) -> Path:
    """The recipe as a file, with other numbers in [train]."""
    values = recipe.model_dump()
    values["train"] |= train
    path.write_text(
        "".join(
            f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in of.items() if v is not None)
            for name, of in values.items()
        )
    )
    return path


def guppy(*arguments: str | Path, processes: int = 1) -> subprocess.Popen[str]:
    """The command as a process, or as several under torchrun."""
    start = ["-m", "guppylm"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "guppylm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *start, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def take_all_steps(run: Run) -> None:
    for _ in run.train():
        pass


@pytest.mark.parametrize("stop_at", [3, 9, 17])
def test_an_interrupted_run_goes_on_bit_for_bit(
    recipe: Recipe, conversations: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    whole = Run(recipe, *conversations, tmp_path / "whole", device=CPU)
    take_all_steps(whole)

    def rate(step: int, of: Any) -> float:
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)
        return schedule(step, of)

    begun = Run(recipe, *conversations, tmp_path / "begun", device=CPU)
    with monkeypatch.context() as patch:
        patch.setattr(training, "schedule", rate)
        take_all_steps(begun)
    assert not begun.finished
    assert begun.step == stop_at + 1
    resumed = Run(recipe, *conversations, tmp_path / "begun", device=CPU, resume=True)
    take_all_steps(resumed)
    assert resumed.finished
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_he_guesses_the_topic_before_a_message_has_ended(recipe: Recipe, tmp_path: Path) -> None:
    said = {"food": ["i brought {} flakes", "{} flakes for you"], "rain": ["a {} cloud came", "{} drops on the roof"]}
    colors = ["red", "blue", "green", "gray", "white", "dark", "pale", "brown"]
    conversations = [
        Conversation(line.format(color) + " and now i go to bed", f"i see {topic}.", topic, "told")
        for topic, lines in said.items()
        for line in lines
        for color in colors
    ] * 8

    values = recipe.model_dump()
    values["train"] |= {"guess_weight": 1.0, "thought_weight": 0.0, "steps": 60}
    run = Run(Recipe.model_validate(values), conversations, [], tmp_path, device=CPU)
    take_all_steps(run)
    topics, right = run.chat.topics, []
    for one in conversations[:: len(conversations) // 32]:
        heard = run.chat.encode_prompt(one.prompt.removesuffix(" i go to bed")).ids[: -len(run.chat.middle)]
        with torch.no_grad():
            logits = run.model(torch.tensor([heard]))[0, -1]
        right.append(topics[max(topics, key=lambda topic: float(logits[topic]))] == one.topic)
    assert sum(right) / len(right) > 0.9


def starting_from(recipe: Recipe, start: Path | str) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"start_from": str(start)})})


def test_started_from_another_fish_he_speaks_as_well_from_the_first_step(
    recipe: Recipe, conversations: Data, small_fish: Path, tmp_path: Path
) -> None:
    fresh = Run(recipe, *conversations, tmp_path / "fresh", device=CPU)
    run = Run(starting_from(recipe, small_fish), *conversations, tmp_path / "run", device=CPU)
    loaded = checkpoint.load(small_fish)
    from_nothing, begun, known = (
        losses(model, chat, conversations[1])["reply, nats a token"]
        for model, chat in ((fresh.model, fresh.chat), (run.model, run.chat), (loaded.model, loaded.format))
    )
    assert begun == pytest.approx(known, abs=1e-3)
    assert known < from_nothing - 0.2
    assert run.model.lm_head.weight is run.model.tok_emb.weight


def test_with_thoughts_he_has_he_keeps_his_tokens(
    recipe: Recipe, conversations: Data, small_fish: Path, tmp_path: Path
) -> None:
    hungry = [replace(c, reply="the zyzzyva is round.") for c in conversations[0] if c.intent == "hungry"]
    run = Run(starting_from(recipe, small_fish), hungry, [], tmp_path, device=CPU)
    elder = checkpoint.load(small_fish).format
    assert run.tokenizer.get_vocab() == elder.tokenizer.get_vocab()
    assert run.config.thoughts == elder.thoughts


def test_new_thoughts_and_words_begin_like_those_he_knows(
    recipe: Recipe, conversations: Data, small_fish: Path, tmp_path: Path
) -> None:
    train, held_out = conversations
    topic = train[0].topic
    new = [
        replace(train[0], topic="moon", intent="full", reply="the zyzzyva is round."),
        replace(train[1], topic=topic, intent="zyzzyva", reply="the zyzzyva is round."),
    ] * 50
    run = Run(starting_from(recipe, small_fish), [*train, *new], held_out, tmp_path, device=CPU)
    old = checkpoint.load(small_fish)
    embedding, numbers = old.model.tok_emb.weight, old.format

    def learnt(*tokens: int) -> torch.Tensor:
        return embedding[list(tokens)].mean(0)

    now = {token: run.model.tok_emb.weight[number] for token, number in run.tokenizer.get_vocab().items()}
    intents = numbers.intents[numbers.encode_thought(topic, train[0].intent)[0]]
    torch.testing.assert_close(now["<|moon|>"], learnt(*numbers.topics))
    torch.testing.assert_close(now["<|moon.full|>"], learnt(*(i for some in numbers.intents.values() for i in some)))
    torch.testing.assert_close(now[f"<|{topic}.zyzzyva|>"], learnt(*intents))
    torch.testing.assert_close(now["Ġzyzzyva"], learnt(*numbers.encode_text(" zyzzyva")))
    assert len(numbers.encode_text(" zyzzyva")) > 1


def test_a_start_that_cannot_be_used_is_named(
    recipe: Recipe, conversations: Data, small_fish: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"train\.start_from: There is no model 'nemo'"):
        Run(starting_from(recipe, "nemo"), *conversations, tmp_path, device=CPU)
    with pytest.raises(TrainError, match="has hidden_size 384, the recipe"):
        Run(starting_from(recipe, "guppy-9m"), *conversations, tmp_path, device=CPU)


def test_every_conversation_comes_once_an_epoch(recipe: Recipe, conversations: Data, tmp_path: Path) -> None:
    run = Run(recipe, *conversations, tmp_path, device=CPU)
    batches = plan(run.rows, recipe.train, 0.4, epoch=0)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(run.rows)))
    assert all(
        len(batch.rows) * batch.positions <= recipe.train.batch_tokens or len(batch.rows) == 1 for batch in batches
    )
    assert plan(run.rows, recipe.train, 0.4, epoch=0) == batches
    assert plan(run.rows, recipe.train, 0.4, epoch=1) != batches


def test_another_recipe_does_not_resume(recipe: Recipe, conversations: Data, tmp_path: Path) -> None:
    take_all_steps(Run(recipe, *conversations, tmp_path, device=CPU))
    other = Recipe.model_validate(recipe.model_dump() | {"train": {"steps": 30}})
    with pytest.raises(TrainError, match="another recipe"):
        Run(other, *conversations, tmp_path, device=CPU, resume=True)


@pytest.mark.parametrize("content", [None, b"", b"junk", {"step": 3}, [1]])
def test_without_a_whole_checkpoint_there_is_nothing_to_resume(
    recipe: Recipe, conversations: Data, tmp_path: Path, content: object
) -> None:
    if isinstance(content, bytes):
        (tmp_path / CHECKPOINT).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / CHECKPOINT)
    with pytest.raises(TrainError, match=r"Start without --resume\."):
        Run(recipe, *conversations, tmp_path, device=CPU, resume=True)


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"Cannot write to .*--out"):
        check_folder(tmp_path / "file" / "run")


def test_a_loss_that_is_no_number_stops_the_run(recipe: Recipe, conversations: Data, tmp_path: Path) -> None:
    wild = Recipe.model_validate(recipe.model_dump() | {"train": {"steps": 20, "learning_rate": 1e30}})
    with pytest.raises(
        TrainError, match=r"no number .* lower train\.learning_rate \(now 1e\+30\) or train\.matrix_rate"
    ):
        take_all_steps(Run(wild, *conversations, tmp_path, device=CPU))
    assert not (tmp_path / CHECKPOINT).exists()


def test_nothing_to_learn_from_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no conversations"):
        Run(recipe, [], [], tmp_path, device=CPU)


def test_nothing_held_out_is_none(recipe: Recipe, conversations: Data, tmp_path: Path) -> None:
    run = Run(recipe, conversations[0], [], tmp_path, device=CPU)
    moments = list(run.train())
    assert [moment.step for moment in moments] == [10, 20]
    assert moments[-1].examined is None
    assert len(Rows([], run.chat, CPU)) == 0


def test_a_vocabulary_too_small_is_named(conversations: Data, recipe: Recipe, tmp_path: Path) -> None:
    many = [Conversation("hi", "hi.", f"topic{n}", "intent") for n in range(100)]
    with pytest.raises(TrainError, match=r"tokenizer\.vocab_size 420 is too small"):
        Run(recipe, many, [], tmp_path, device=CPU)


def test_the_rate_rises_stays_and_falls_to_nothing(recipe: Recipe) -> None:
    rates = [schedule(step, recipe.train) for step in range(20)]
    assert max(rates) == 1
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.11


def test_ctrl_c_leaves_a_checkpoint_and_resume_finishes(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml", recipe, steps=400)
    out = tmp_path / "run"
    arguments = ("train", "--recipe", path, "--data", data, "--out", out)
    process = guppy(*arguments)
    while process.poll() is None and not ((out / LOG).exists() and (out / LOG).read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate()
    assert process.returncode == 130, complaint
    assert "Go on with --resume." in said
    assert complaint == ""
    assert (out / CHECKPOINT).exists()

    begun_again = guppy(*arguments)
    _, complaint = begun_again.communicate()
    assert begun_again.returncode == 2
    assert "holds a run already" in complaint

    resumed = guppy(*arguments, "--resume")
    said, complaint = resumed.communicate()
    assert resumed.returncode == 0, complaint
    assert "resumed    at step" in said
    assert not (out / CHECKPOINT).exists()
    assert "400 steps" in " ".join((out / "README.md").read_text().split())
    assert checkpoint.load(out).format.thoughts == {"food": ["fruit", "hungry"]}


def test_two_processes_take_the_steps_of_one(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml", recipe, learning_rate=3e-3)
    runs = [guppy("train", "--recipe", path, "--data", data, "--out", tmp_path / f"{n}", processes=n) for n in (1, 2)]
    for process in runs:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / f"{n}" / LOG).read_text().splitlines()] for n in (1, 2)
    )
    assert len(one) == 2
    assert two == pytest.approx(one, rel=5e-3)  # bf16 rounds sums of halves otherwise
    assert checkpoint.load(tmp_path / "2")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "nowhere"], "nowhere/train.jsonl is missing. Compose it with: guppy data --out nowhere"),
        (["--set", "train.speed=3"], "train.speed"),
        (["--set", "data.character=shark"], "There is no character 'shark'"),
        (["--set", "train.start_from=nemo"], "train.start_from: There is no model 'nemo'"),
        (["--resume"], "There is no run to resume"),
    ],
)
def test_a_run_that_cannot_begin_says_why(data: Path, tmp_path: Path, arguments: list[str], complaint: str) -> None:
    given = ["--data", str(data), *arguments] if "--data" not in arguments and "--set" not in arguments else arguments
    process = guppy("train", "--out", tmp_path / "run", *given)
    _, said = process.communicate()
    assert process.returncode in (1, 2)
    assert complaint in said
    assert said.count("\n") == 1, said
