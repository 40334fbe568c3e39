"""The model in int8, by code for this very processor: the fastest way to run it on a CPU.

`native.c` does the arithmetic, in three hundred lines of loops; the C compiler of this machine compiles it,
once, and the weights are laid out for it. Where there is no compiler, guppylm.engine's fp32 and bf16 remain.

A call computes without Python's lock, so two threads with a cache each keep two cores busy.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from guppylm.model import Block, GuppyLM

if TYPE_CHECKING:
    from guppylm.engine import Sampling

SOURCE = Path(__file__).with_name("native.c")
# What lets a compiler put sums in another order, and so use the processor's wide registers.
FLAGS = [
    *("-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-ffinite-math-only", "-fassociative-math"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
]
# For this machine alone. For an image that runs on others, `python -m guppylm.native` compiles the code ahead for the
# processors below: what the compiler is told, and what /proc/cpuinfo must name. The first that fits is used.
HERE = ["-march=native"]
AHEAD = {
    "amx": (
        ["-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"},
    ),
    "v3": (["-march=x86-64-v3"], {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
}
# Limits of native.c's buffers.
ROWS, WIDEST, LONGEST = 64, 4096, 1024


class Unavailable(Exception):
    """There is no native code on this machine. The message says why."""


class _Choice(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")),
        ("top_k", ctypes.c_int32),
        ("draw", ctypes.c_double),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")),
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layers", "heads", "width", "inner", "window", "slots")),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "norm_weight", "norm_bias")),
        ("blocks", ctypes.c_void_p),
        ("head", _Linear),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


def _processor() -> str:
    """What tells this processor from others, as far as compiled code is concerned."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return " ".join(sorted({line for line in lines if line.startswith(("model", "flags", "Features", "CPU part"))}))


def _name(*told: str) -> str:
    """A name for what comes of the source and what the compiler is told: what is out of date is not found."""
    return f"native-{hashlib.sha256(repr((FLAGS, told)).encode() + SOURCE.read_bytes()).hexdigest()[:16]}.so"


def _ahead() -> dict[Path, list[str]]:
    """The files that `python -m guppylm.native` makes for processors like this one, and how."""
    able = set(_processor().split())
    return {SOURCE.with_name(_name(*flags)): flags for flags, needs in AHEAD.values() if needs <= able}


@cache
def library() -> ctypes.CDLL:
    """The code, compiled ahead or before, or now. Raises Unavailable."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guppylm"
    here = home / _name(*HERE, _processor(), platform.platform())
    compiled = next((path for path in _ahead() if path.is_file()), here)
    if not compiled.is_file():
        _compile(compiled, HERE)
    try:
        code = ctypes.CDLL(str(compiled))
    except OSError as error:
        raise Unavailable(f"{compiled} cannot be loaded: {error}") from None
    code.guppy_read.restype = code.guppy_choose.restype = None
    return code


@cache
def has_tiles() -> bool:
    """Whether the code uses the processor's tiles (AMX): blocks of int8 in one instruction. Raises Unavailable."""
    answer = library().guppy_begin()
    if answer < 0:
        raise Unavailable("the system does not let us use this processor's tiles (AMX)")
    return bool(answer)


def _compile(target: Path, told: list[str]) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler here (cc)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            subprocess.run(
                [compiler, *FLAGS, *told, str(SOURCE), "-o", str(made), "-lm"],
                check=True,
                capture_output=True,
                timeout=60,
            )
            made.replace(target)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[0]
        raise Unavailable(f"the C compiler fails: {reason}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the native code cannot be compiled: {error}") from None


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class NativeModel:
    """The weights of a model in int8, laid out for native.c. Any number of caches share them."""

    def __init__(self, model: GuppyLM) -> None:
        """Raises Unavailable."""
        config = model.config
        widest = max(3 * config.hidden_size, config.intermediate_size)
        if widest > WIDEST or config.max_position_embeddings > LONGEST:
            raise Unavailable("this model is too large for the native code")
        self.code = library()
        self.tiles = has_tiles()
        self.config = config
        self._kept: list[Any] = []  # what the C side points into
        blocks = (_Block * config.num_hidden_layers)()
        for target, block in zip(blocks, model.blocks, strict=True):
            block = cast(Block, block)
            for name in ("norm1", "norm2"):
                norm = getattr(block, name)
                setattr(target, f"{name}_weight", self._keep(norm.weight))
                setattr(target, f"{name}_bias", self._keep(norm.bias))
            target.qkv, target.out = self._linear(block.attn.qkv), self._linear(block.attn.out)
            target.up, target.down = self._linear(block.ffn.up), self._linear(block.ffn.down)
        self._kept.append(blocks)
        self.shape = _Model(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            width=config.hidden_size,
            inner=config.intermediate_size,
            window=config.max_position_embeddings,
            tokens=self._keep(model.tok_emb.weight),
            positions=self._keep(model.pos_emb.weight),
            norm_weight=self._keep(model.norm.weight),
            norm_bias=self._keep(model.norm.bias),
            blocks=ctypes.addressof(blocks),
            head=self._linear(model.lm_head),
        )

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor, which from now on stays where it is."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, layer: nn.Linear) -> _Linear:
        weight = layer.weight.detach().float()
        outputs, inputs = weight.shape
        scale = weight.abs().amax(1).clamp_min(1e-20) / 127
        whole = torch.zeros(_up(outputs, 16), _up(inputs, 64), dtype=torch.int8)
        whole[:outputs, :inputs] = (weight / scale[:, None]).round().to(torch.int8)
        scales, bias = torch.zeros(len(whole)), torch.zeros(len(whole))
        scales[:outputs] = scale
        if layer.bias is not None:
            bias[:outputs] = layer.bias.detach()
        # (blocks of 16 outputs, blocks of 64 inputs, 16 fours of inputs, 16 outputs, 4 inputs)
        in_blocks = whole.view(len(whole) // 16, 16, whole.shape[1] // 64, 16, 4).permute(0, 2, 3, 1, 4)
        laid_out = in_blocks if self.tiles else whole
        return _Linear(whole.shape[1], len(whole), self._keep(laid_out), self._keep(scales), self._keep(bias))


class NativeMind:
    """Keys and values of `slots` replies, and the calls that read tokens into them: a guppylm.engine.Mind."""

    at_once = 128

    def __init__(self, model: NativeModel, slots: int) -> None:
        config = model.config
        self._model = model
        self._vocabulary = config.vocab_size
        heads, window = config.num_attention_heads, config.max_position_embeddings
        channels = config.hidden_size // heads
        size = (config.num_hidden_layers, slots, heads)
        # numpy asks the system for large pages; with small ones, looking them up costs more than reading them.
        self._keys = np.zeros((*size, _up(window, 16) * _up(channels, 2)), dtype=np.uint16)
        self._values = np.zeros((*size, _up(channels, 16) * _up(window, 2)), dtype=np.uint16)
        self._work = torch.empty(ROWS * (5 * config.hidden_size + config.intermediate_size))
        self._values_of_choice = np.empty(config.vocab_size, dtype=np.float32)
        self._tokens_of_choice = np.empty(config.vocab_size, dtype=np.int32)
        self._shape = _Model.from_buffer_copy(model.shape)
        self._shape.slots = slots
        self._shape.keys, self._shape.values = self._keys.ctypes.data, self._values.ctypes.data
        self._place = list(range(slots))  # where in memory each slot lies
        self.length = [0] * slots

    def prefill(self, first_slot: int, prompts: list[list[int]]) -> Tensor:
        """Read whole prompts into the slots from `first_slot` on. Returns the logits after each, (len(prompts), V)."""
        ids = [token for prompt in prompts for token in prompt]
        slots = [self._place[slot] for slot, prompt in enumerate(prompts, first_slot) for _ in prompt]
        positions = [position for prompt in prompts for position in range(len(prompt))]
        wanted = [position == len(prompt) - 1 for prompt in prompts for position in range(len(prompt))]
        self.length[first_slot : first_slot + len(prompts)] = [len(prompt) for prompt in prompts]
        return self._read(ids, slots, positions, bytes(wanted), len(prompts))

    def decode(self, ids: list[int]) -> Tensor:
        """One step: `ids` are the newest tokens of slots 0 to n-1. Returns the logits for the next ones, (n, V)."""
        n = len(ids)
        positions = self.length[:n]
        self.length[:n] = [position + 1 for position in positions]
        return self._read(ids, self._place[:n], positions, b"\1" * n, n)

    def move(self, source: int, target: int) -> None:
        """Move a reply to another slot: only the two change names."""
        names = self._place
        names[source], names[target] = names[target], names[source]
        self.length[target] = self.length[source]

    def choose(
        self, logits: Tensor, mask: Tensor, rows: list[int], settings: list[Sampling], draws: list[float]
    ) -> list[int]:
        """As Mind.choose."""
        n, V = len(rows), self._vocabulary
        choices = [
            _Choice(s.divisor, s.top_p, s.min_p, s.most(V), draw) for s, draw in zip(settings, draws, strict=True)
        ]
        chosen = (ctypes.c_int32 * n)()
        self._model.code.guppy_choose(
            n,
            V,
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_void_p(mask.data_ptr()),
            (ctypes.c_int32 * n)(*rows),
            (_Choice * n)(*choices),
            ctypes.c_void_p(self._values_of_choice.ctypes.data),
            ctypes.c_void_p(self._tokens_of_choice.ctypes.data),
            chosen,
        )
        return list(chosen)

    def _read(self, ids: list[int], slots: list[int], positions: list[int], wanted: bytes, asked: int) -> Tensor:
        n = len(ids)
        numbers = ctypes.c_int32 * n
        logits = torch.empty(asked, self._vocabulary)
        self._model.code.guppy_read(
            ctypes.byref(self._shape),
            n,
            numbers(*ids),
            numbers(*slots),
            numbers(*positions),
            wanted,
            self._vocabulary,
            ctypes.c_void_p(self._work.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
        )
        return logits


if __name__ == "__main__":
    for told, _ in AHEAD.values():
        _compile(SOURCE.with_name(_name(*told)), told)
