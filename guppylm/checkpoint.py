"""A model folder: config.json, tokenizer.json, model.safetensors (and a README.md, its card).

`load` reads ours and the public GuppyLM's (`pytorch_model.bin`, opened with `weights_only=True`: a pickle that wants
to run code is refused). It is strict: a missing or extra tensor, a wrong shape, a vocabulary that doesn't match, an
unknown key are a `ModelError` that names file and field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from guppylm import hub
from guppylm.conversation import IM_END, IM_END_TOKEN, IM_START, IM_START_TOKEN, PAD, ChatFormat
from guppylm.model import GuppyLM, ModelConfig

WEIGHTS = Path(__file__).parent / "weights"
DEFAULT_MODEL = "guppy-9m"

# Keys of a hub config that say what kind of model it is, not how it is shaped.
_LABELS = {"model_type": "guppylm", "architectures": ["GuppyLM"]}
_MARKUP_IDS = {"pad_token_id": PAD, "bos_token_id": IM_START, "eos_token_id": IM_END}


class ModelError(Exception):
    """A model folder cannot be used. The message is one sentence for a person: what is wrong, in which file."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model folder: the model in evaluation mode, fp32 on the CPU, and its chat format."""

    path: Path
    model: GuppyLM
    format: ChatFormat


def find(model: str | Path) -> Path:
    """The folder of a model: one that ships (`guppy-9m`), a path, or `owner/name` on the hub. Raises ModelError."""
    for folder in (Path(model), WEIGHTS / model):
        try:
            if folder.is_dir():
                return folder
        except OSError as error:  # a name too long, a folder that is somebody else's
            raise ModelError(f"Cannot look for the model '{model}': {error.strerror}.") from None
    if hub.is_repository(str(model)):
        try:
            return hub.pull(str(model))
        except hub.HubError as error:
            raise ModelError(f"There is no folder '{model}', and as a model of the hub: {error}") from None
    shipped = ", ".join(sorted(folder.name for folder in WEIGHTS.glob("*/"))) or "none"
    raise ModelError(
        f"There is no model '{model}': not a folder, not one that ships with Guppy ({shipped}), "
        "not owner/name on the hub."
    )


def _read_config(path: Path) -> ModelConfig:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; a model folder has config.json, tokenizer.json and weights.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold an object of settings.")
    for key, expected in _LABELS.items():
        if values.pop(key, expected) != expected:
            raise ModelError(f"{path}: {key} is not {expected!r}; this is another kind of model.")
    known = {field.name for field in fields(ModelConfig)}
    if unknown := sorted(set(values) - known):
        raise ModelError(f"{path}: unknown key '{unknown[0]}'.")
    if missing := sorted(known - set(values) - {"thoughts", "hidden_dropout_prob"}):
        raise ModelError(f"{path}: the key '{missing[0]}' is missing.")
    for key, number in _MARKUP_IDS.items():
        if values[key] != number:
            raise ModelError(f"{path}: {key} is {values[key]!r}; Guppy's chat markup has {number} there.")
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ModelError(f"{path}: {error}.") from None


def _read_tokenizer(path: Path, config: ModelConfig) -> ChatFormat:
    if not path.is_file():
        raise ModelError(f"{path} is missing; a model folder has config.json, tokenizer.json and weights.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is no tokenizer ({error}).") from None
    if (size := max(tokenizer.get_vocab().values(), default=0) + 1) > config.vocab_size:
        raise ModelError(f"{path} has {size} tokens, but config.json says vocab_size {config.vocab_size}.")
    for token, number in ((IM_START_TOKEN, IM_START), (IM_END_TOKEN, IM_END)):
        if tokenizer.token_to_id(token) != number:
            raise ModelError(f"{path}: {token} must have id {number}, it has {tokenizer.token_to_id(token)}.")
    chat = ChatFormat(tokenizer, config.max_position_embeddings, config.thoughts)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        if number in chat.encode_text(added.content):
            raise ModelError(f"{path}: {added.content} must be a special token, or people could type it.")
    try:
        chat.topics, chat.intents  # noqa: B018  both look every thought up
    except KeyError as error:
        raise ModelError(f"{path} has no token {error.args[0]} for a thought that config.json names.") from None
    if chat.window < len(chat.head) + len(chat.middle) + 8:
        raise ModelError(f"{path.parent / 'config.json'}: max_position_embeddings {chat.window} holds no conversation.")
    return chat


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    path = folder / "model.safetensors"
    try:
        if path.is_file():
            return path, load_file(path)
        path = folder / "pytorch_model.bin"
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(
                isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
            ):
                raise ModelError(f"{path} does not hold named tensors.")
            return path, state
    except ModelError:
        raise
    except Exception as error:  # whatever two formats' readers raise for damaged files: it is a long list
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} cannot be read: damaged, incomplete or unsafe ({reason}).") from None
    raise ModelError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin.")


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model and their shapes. (Asking a model on torch's meta device takes a second longer: it
    imports the compiler.)"""
    C, F = config.hidden_size, config.intermediate_size
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (C,),
        "norm1.bias": (C,),
        "attn.qkv.weight": (3 * C, C),
        "attn.qkv.bias": (3 * C,),
        "attn.out.weight": (C, C),
        "attn.out.bias": (C,),
        "norm2.weight": (C,),
        "norm2.bias": (C,),
        "ffn.up.weight": (F, C),
        "ffn.up.bias": (F,),
        "ffn.down.weight": (C, F),
        "ffn.down.bias": (C,),
    }
    return {
        "tok_emb.weight": (config.vocab_size, C),
        "pos_emb.weight": (config.max_position_embeddings, C),
        **{f"blocks.{n}.{name}": shape for n in range(config.num_hidden_layers) for name, shape in block.items()},
        "norm.weight": (C,),
        "norm.bias": (C,),
        "lm_head.weight": (config.vocab_size, C),
    }


def load(model: str | Path = DEFAULT_MODEL) -> Checkpoint:
    """Load a model folder. Raises ModelError."""
    folder = find(model)
    config = _read_config(folder / "config.json")
    chat = _read_tokenizer(folder / "tokenizer.json", config)
    path, state = _read_weights(folder)
    state.setdefault("lm_head.weight", state.get("tok_emb.weight", torch.empty(0)))  # tied: ours is stored once
    if config.num_hidden_layers > len(state):
        raise ModelError(f"{path}: config.json says num_hidden_layers {config.num_hidden_layers}; it holds fewer.")
    expected = _shapes(config)
    if missing := sorted(set(expected) - set(state)):
        raise ModelError(f"{path}: the tensor '{missing[0]}' is missing.")
    if extra := sorted(set(state) - set(expected)):
        raise ModelError(f"{path}: unexpected tensor '{extra[0]}'; config.json describes a smaller model.")
    for name, shape in expected.items():
        tensor = state[name]
        if tensor.shape != shape:
            raise ModelError(f"{path}: '{name}' has shape {tuple(tensor.shape)}, config.json asks for {shape}.")
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ModelError(f"{path}: '{name}' holds values that are not finite numbers.")
    if not torch.equal(state["lm_head.weight"], state["tok_emb.weight"]):
        raise ModelError(f"{path}: 'lm_head.weight' differs from 'tok_emb.weight'; Guppy's head is tied to it.")
    fish = GuppyLM(config)
    fish.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    fish.lm_head.weight = fish.tok_emb.weight
    return Checkpoint(folder, fish.eval().requires_grad_(False), chat)


def save(folder: Path, model: GuppyLM, tokenizer: Tokenizer, card: str, dtype: torch.dtype = torch.float16) -> None:
    """Write a model folder; each file appears whole or not at all.

    Half precision halves the file: weights lie between -4 and 4, where fp16 keeps three digits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_LABELS, **asdict(model.config)}
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # the token embedding, stored once
    writers: dict[str, Callable[[Path], object]] = {
        "config.json": lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
        "tokenizer.json": lambda path: tokenizer.save(str(path)),
        "model.safetensors": lambda path: save_file(state, path),
        "README.md": lambda path: path.write_text(card, encoding="utf-8"),
    }
    for name, write in writers.items():
        partial = folder / f"{name}.partial"
        write(partial)
        partial.replace(folder / name)
