"""The transformer: its shapes, and that it never looks ahead."""

from __future__ import annotations

import pytest
import torch

from guppylm.model import GuppyLM, ModelConfig


@pytest.fixture
def model() -> GuppyLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, max_position_embeddings=16, hidden_size=21, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=10,
    )  # fmt: skip
    model = GuppyLM(config).eval()
    for parameter in model.parameters():  # as if trained: a fresh model's layers say nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_logits_for_every_position(model: GuppyLM) -> None:
    assert model(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 50)
    assert model.hidden(torch.zeros(2, 1, dtype=torch.long)).shape == (2, 1, 21)


@pytest.mark.parametrize("changed", range(1, 16))
def test_a_later_token_changes_no_earlier_logits(model: GuppyLM, changed: int) -> None:
    ids = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, changed:] = (other[0, changed:] + 7) % 50
    before, after = model(ids), model(other)
    torch.testing.assert_close(before[:, :changed], after[:, :changed])
    assert not torch.allclose(before[:, changed], after[:, changed])


def test_a_conversation_does_not_hear_its_neighbours(model: GuppyLM) -> None:
    ids = torch.randint(0, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids)[3:4], model(ids[3:4]))


def test_order_matters(model: GuppyLM) -> None:
    there, back = model(torch.tensor([[3, 4, 5]])), model(torch.tensor([[4, 3, 5]]))
    assert not torch.allclose(there[:, -1], back[:, -1])


def test_the_head_is_the_token_embedding(model: GuppyLM) -> None:
    assert model.lm_head.weight is model.tok_emb.weight
    assert model.parameter_count() == sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.state_dict().values()) - model.parameter_count() == 50 * 21


def test_the_fish_that_ships_has_nine_million_numbers() -> None:
    with torch.device("meta"):
        assert 8.5e6 < GuppyLM(ModelConfig()).parameter_count() < 9.5e6


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_attention_heads": 5}, "hidden_size 384 does not divide into num_attention_heads 5"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob is 1"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob is '0.1'"),
        ({"thoughts": ["food"]}, "thoughts"),
        ({"thoughts": {"food": []}}, "thoughts"),
    ],
)
def test_a_shape_that_cannot_be_is_named(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelConfig(**values)  # type: ignore[arg-type]
