"""The floor: a linear classifier on pieces of words, which the fish's listening must beat.

It sees a prompt as a bag of character n-grams (2 to 5 letters within a word, and whole words), hashes them into a
table, adds up what each speaks for, and names a topic. No order, no network; trained in under a minute.
"""

from __future__ import annotations

import random
import zlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from guppylm.conversation import hear
from guppylm.datagen.dataset import normalised

TABLE = 2**18


def features(prompt: str) -> list[int]:
    """The hashed n-grams of a prompt."""
    found: list[str] = []
    for word in normalised(hear(prompt)).split():
        found.append(f"={word}")
        padded = f"<{word}>"
        found += [padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)]
    return [zlib.crc32(gram.encode()) % TABLE for gram in found] or [0]


class LinearBaseline:
    """Names the topic of a prompt. Train it with `LinearBaseline(prompts, topics)`."""

    def __init__(self, prompts: list[str], topics: list[str], *, epochs: int = 4, seed: int = 0) -> None:
        self.names = sorted(set(topics))
        number = {name: index for index, name in enumerate(self.names)}
        rows = [torch.tensor(features(prompt)) for prompt in prompts]
        labels = torch.tensor([number[topic] for topic in topics])
        self._table = nn.EmbeddingBag(TABLE, len(self.names), mode="mean", sparse=True)
        nn.init.zeros_(self._table.weight)
        optimizer = torch.optim.Adagrad(self._table.parameters(), lr=1.0)
        order = list(range(len(rows)))
        rng = random.Random(seed)
        for _ in range(epochs):
            rng.shuffle(order)
            for begin in range(0, len(order), 64):
                some = order[begin : begin + 64]
                loss = F.cross_entropy(self._scores([rows[i] for i in some]), labels[some])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def _scores(self, rows: list[Tensor]) -> Tensor:
        offsets = torch.tensor([0, *[len(row) for row in rows[:-1]]]).cumsum(0)
        scores: Tensor = self._table(torch.cat(rows), offsets)
        return scores

    @torch.no_grad()
    def topics(self, prompts: list[str]) -> list[str]:
        """The likeliest topic of each prompt."""
        scores = self._scores([torch.tensor(features(prompt)) for prompt in prompts])
        return [self.names[int(index)] for index in scores.argmax(-1)]
