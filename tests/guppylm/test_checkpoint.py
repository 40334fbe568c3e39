"""Model folders: what is saved comes back, the public GuppyLM's loads too, and whatever is wrong is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from guppylm import checkpoint
from guppylm.checkpoint import ModelError
from guppylm.engine import Engine
from guppylm.model import GuppyLM, ModelConfig


@pytest.fixture
def folder(small_fish: Path, tmp_path: Path) -> Path:
    """A copy of the small fish, to be broken."""
    return Path(shutil.copytree(small_fish, tmp_path / "fish"))


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A folder laid out as the public GuppyLM's: pickled weights with the tied head included, hub-style keys, a
    tokenizer that has neither all bytes nor as many tokens as the model."""
    folder = tmp_path / "public"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["user\n", "assistant\n", "hi guppy", "the water is warm."] * 9,
        trainers.BpeTrainer(special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"], show_progress=False),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    model = GuppyLM(ModelConfig(vocab_size=128, hidden_size=24, num_attention_heads=3, intermediate_size=12))
    assert tokenizer.get_vocab_size() < 128
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = {
        "model_type": "guppylm", "architectures": ["GuppyLM"], "vocab_size": 128, "max_position_embeddings": 128,
        "hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 12,
        "hidden_dropout_prob": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def complaint(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 0.0), (torch.float16, 1e-3)])
def test_what_is_saved_comes_back(small_fish: Path, tmp_path: Path, dtype: torch.dtype, close: float) -> None:
    before = checkpoint.load(small_fish)
    checkpoint.save(tmp_path / "copy", before.model, before.format.tokenizer, "# A card\n", dtype)
    after = checkpoint.load(tmp_path / "copy")
    assert after.model.config == before.model.config
    assert after.format.thoughts == before.format.thoughts
    assert after.format.encode_prompt("Are you hungry?") == before.format.encode_prompt("Are you hungry?")
    for name, tensor in before.model.state_dict().items():
        torch.testing.assert_close(after.model.state_dict()[name], tensor, rtol=close, atol=close)
    assert after.model.lm_head.weight is after.model.tok_emb.weight
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_the_tied_head_is_stored_once(small_fish: Path) -> None:
    assert "lm_head.weight" not in load_file(small_fish / "model.safetensors")


async def test_a_folder_like_the_public_one_loads_and_chats(public: Path) -> None:
    loaded = checkpoint.load(public)
    assert loaded.format.thoughts == {}
    engine = Engine.of(loaded)
    try:
        for prompt in ("hi guppy", "你好 🐟", "<|im_end|>", "", "guppy 你 " * 1000):
            completion = await engine.ask(prompt, seed=1)
            assert completion.text
            assert "<|" not in completion.text
            assert completion.topic is None
    finally:
        await engine.aclose()


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_config(rope_theta=1), "unknown key 'rope_theta'"),
        (change_config(hidden_size=...), "the key 'hidden_size' is missing"),
        (change_config(hidden_size="384"), "hidden_size is '384'"),
        (change_config(num_attention_heads=7), "num_attention_heads 7"),
        (change_config(hidden_dropout_prob="none"), "hidden_dropout_prob"),
        (change_config(model_type="llama"), "model_type"),
        (change_config(architectures=["Llama"]), "architectures"),
        (change_config(eos_token_id=5), "eos_token_id is 5"),
        (change_config(thoughts=3), "thoughts"),
        (change_config(max_position_embeddings=9), "max_position_embeddings 9 holds no conversation"),
        (change_config(num_hidden_layers=10**12), "num_hidden_layers"),
        (change_config(hidden_size=30 * 10**17), "config.json asks for (420, 3000000000000000000)"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "an object of settings"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "is missing"),
    ],
)
def test_a_wrong_config_is_named(folder: Path, change: Callable[[Path], None], field: str) -> None:
    change(folder)
    message = complaint(folder)
    assert "config.json" in message
    assert field in message


def tokens_may_be_typed(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"special": true', '"special": false'))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no tokenizer"),
        (lambda folder: os.truncate(folder / "tokenizer.json", 500), "is no tokenizer"),
        (change_config(vocab_size=100), "config.json says vocab_size 100"),
        (change_config(thoughts={"food": ["fed"]}), "no token <|food.fed|>"),
        (tokens_may_be_typed, "must be a special token"),
        (lambda folder: Tokenizer(models.BPE()).save(str(folder / "tokenizer.json")), "<|im_start|> must have id 1"),
    ],
)
def test_a_wrong_tokenizer_is_named(folder: Path, change: Callable[[Path], None], field: str) -> None:
    change(folder)
    message = complaint(folder)
    assert "tokenizer.json" in message
    assert field in message


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


NORM = "norm.weight"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_weights(lambda state: state.pop(NORM)), "'norm.weight' is missing"),
        (change_weights(lambda state: state.pop("tok_emb.weight")), "'tok_emb.weight' is missing"),
        (change_weights(lambda state: state.update(extra=torch.zeros(3))), "unexpected tensor 'extra'"),
        (change_weights(lambda state: state.update({NORM: torch.zeros(3)})), "'norm.weight' has shape (3,)"),
        (change_weights(lambda state: state[NORM].fill_(float("nan"))), "'norm.weight' holds values"),
        (change_weights(lambda state: state[NORM].fill_(float("inf"))), "'norm.weight' holds values"),
        (change_weights(lambda state: state.update({NORM: state[NORM].int()})), "'norm.weight' holds values"),
        (
            change_weights(lambda state: state.update({"lm_head.weight": state["tok_emb.weight"] + 1})),
            "'lm_head.weight' differs",
        ),
        (change_config(num_hidden_layers=4), "'blocks.3.attn.out.bias' is missing"),
        (change_config(num_hidden_layers=2), "unexpected tensor 'blocks.2"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot be read"),
        (lambda folder: os.truncate(folder / "model.safetensors", 0), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(os.urandom(999)), "cannot be read"),
    ],
)
def test_wrong_weights_are_named(folder: Path, change: Callable[[Path], None], field: str) -> None:
    change(folder)
    message = complaint(folder)
    assert "model.safetensors" in message
    assert field in message


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in complaint(folder)


class Trap:
    """Unpickling it would run a program."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def test_a_pickle_that_wants_to_run_code_is_refused(public: Path, tmp_path: Path) -> None:
    torch.save({"tok_emb.weight": Trap(tmp_path / "proof")}, public / "pytorch_model.bin")
    assert "unsafe" in complaint(public)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("size", [0, 10, 20_000])
def test_truncated_pickled_weights_are_refused(public: Path, size: int) -> None:
    os.truncate(public / "pytorch_model.bin", size)
    assert "pytorch_model.bin cannot be read" in complaint(public)


@pytest.mark.parametrize("content", [[1, 2], {"tok_emb.weight": 3}, {7: torch.zeros(2)}])
def test_a_pickle_of_something_else_is_refused(public: Path, content: object) -> None:
    torch.save(content, public / "pytorch_model.bin")
    assert "does not hold named tensors" in complaint(public)


@pytest.mark.parametrize("name", ["nemo", "no/such/folder", "nemo" * 200, "../nemo", "fish.safetensors"])
def test_a_model_that_is_nowhere_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        checkpoint.load(name)
