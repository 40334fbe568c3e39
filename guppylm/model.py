"""The model: a vanilla transformer, to be read from top to bottom.

Ids go in, one row a conversation; logits come out: for every position, how likely each token is to come next.

    ids (B, T) -> token + position embeddings (B, T, C) -> 6 x Block -> LayerNorm -> logits (B, T, V)

B conversations of T tokens, C channels (384), H heads of D channels each (6 x 64), V tokens in the vocabulary.
No GQA, RoPE, SwiGLU or early exit. The names of the parameters are the public GuppyLM's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model, under the names that a model folder's config.json uses.

    thoughts: intents by topic that the fish may think before it speaks; empty for a model that does not think.
    """

    vocab_size: int = 4096
    max_position_embeddings: int = 128
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    intermediate_size: int = 768
    hidden_dropout_prob: float = 0.0
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    thoughts: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number above 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into num_attention_heads {self.num_attention_heads}"
            )
        if not isinstance(self.hidden_dropout_prob, int | float) or not 0 <= self.hidden_dropout_prob < 1:
            raise ValueError(f"hidden_dropout_prob is {self.hidden_dropout_prob!r}; it must be at least 0 and below 1")
        if not isinstance(self.thoughts, dict) or not all(
            isinstance(intents, list) and intents and all(isinstance(intent, str) for intent in intents)
            for intents in self.thoughts.values()
        ):
            raise ValueError("thoughts must name the intents of each topic, like {'food': ['hungry', 'offered']}")


class Attention(nn.Module):
    """Every position looks back at the positions before it and takes from them what it needs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        # Each head asks (q), offers (k) and tells (v): three (B, H, T, D).
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        # scores[b, h, i, j]: how much position i wants to hear position j. The future is hidden.
        # Written out, not fused: at 30 tokens a row the plain product is the faster one on a CPU, too.
        scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]))
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        heard = self.dropout(weights) @ v
        out: Tensor = self.out(heard.transpose(1, 2).reshape(B, T, C))
        return out


class FeedForward(nn.Module):
    """Every position thinks about what it has heard, on its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        out: Tensor = self.down(F.relu(self.up(x)))
        return out


class Block(nn.Module):
    """Listen, then think; each adds to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.ffn(self.norm2(x)))
        return x  # noqa: RET504  two lines of one shape


class GuppyLM(nn.Module):
    """The whole fish."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_emb = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.tok_emb.weight  # what a word is like coming in, it is like going out
        self.apply(self._init)
        # What a word is matters more than where it stands, and at first every layer adds nothing: of the ways to begin
        # that were tried, a model that began like this listened soonest (training/LOG.md).
        nn.init.normal_(self.pos_emb.weight, std=0.002)
        for name, parameter in self.named_parameters():
            if name.endswith(("attn.out.weight", "ffn.down.weight")):
                nn.init.zeros_(parameter)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> what the last layer knows at every position, (B, T, C)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.tok_emb(ids) + self.pos_emb(positions))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T), T at most the window -> logits (B, T, V)."""
        logits: Tensor = self.lm_head(self.hidden(ids))
        return logits

    def parameter_count(self) -> int:
        """How many numbers were learnt (the tied head counts once)."""
        return sum(parameter.numel() for parameter in self.parameters())
