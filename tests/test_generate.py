"""Greedy decoding of the parts of a model, as used to compare it before and after surgery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_surgery.errors import ModelError, UsageError
from moe_surgery.models.greedy import greedy_tokens
from moe_surgery.models.opening import load_model


@pytest.fixture(scope="module")
def omni(omni_dir: Path) -> nn.Module:
    return load_model(str(omni_dir)).module


def test_thinker_and_talker_both_decode(omni: nn.Module) -> None:
    tokens = greedy_tokens(omni, [1, 2, 3], 6)
    assert list(tokens) == ["thinker", "talker"]
    assert [len(part) for part in tokens.values()] == [6, 6]
    assert tokens == greedy_tokens(omni, [1, 2, 3], 6)
    assert tokens != greedy_tokens(omni, [4, 5, 6], 6)


@torch.no_grad()
def test_tokens_are_the_likeliest(omni: nn.Module) -> None:
    """Decoding without a cache, the whole prefix at every step, chooses the same thinker tokens."""
    ids = [1, 2, 3]
    for _ in range(6):
        ids.append(int(omni.thinker(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert greedy_tokens(omni, [1, 2, 3], 6)["thinker"] == ids[3:]
    first = omni.talker(inputs_embeds=omni.talker.get_input_embeddings()(torch.tensor([[1, 2, 3]]))).logits
    assert greedy_tokens(omni, [1, 2, 3], 1)["talker"] == [int(first[0, -1].argmax())]


@pytest.mark.parametrize("part", ["thinker", "talker"])
def test_a_broken_block_shows(omni: nn.Module, part: str) -> None:
    """Each part's own MoE blocks decide its tokens: turning the sign of one layer's experts changes them."""
    before = greedy_tokens(omni, [1, 2, 3], 12)
    down = getattr(omni, part).model.layers[1].mlp.experts.down_proj
    with torch.no_grad():
        down.neg_()
        after = greedy_tokens(omni, [1, 2, 3], 12)
        down.neg_()
    other = "talker" if part == "thinker" else "thinker"
    assert after[part] != before[part]
    assert after[other] == before[other]


def test_a_plain_language_model_is_one_part(write_tiny: Callable[[str], Path]) -> None:
    model = load_model(str(write_tiny("float32"))).module
    tokens = greedy_tokens(model, [1, 2, 3], 5)
    assert list(tokens) == ["model"]
    assert len(tokens["model"]) == 5


def test_unusable_prompts(write_tiny: Callable[[str], Path]) -> None:
    model = load_model(str(write_tiny("float32"))).module
    with pytest.raises(UsageError, match="model: token 64 is not in the vocabulary of 64"):
        greedy_tokens(model, [1, 64], 5)
    with pytest.raises(UsageError, match="a token id must be a whole number from 0 to .*, not -1"):
        greedy_tokens(model, [-1], 5)
    for prompt, count in (([], 5), ([1], 0)):
        with pytest.raises(UsageError, match="(at least one|a whole number from 1)"):
            greedy_tokens(model, prompt, count)
    with pytest.raises(UsageError, match="Linear has no part that generates"):
        greedy_tokens(nn.Linear(2, 2), [1], 1)


class OwnGenerate(nn.Module):
    """A model as people publish them with code of their own, whose ``generate`` samples."""

    def __init__(self, ends: int | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.config = type("Config", (), {"eos_token_id": ends})()

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.head(self.embed(input_ids).cumsum(1)),)

    def generate(self, *_: object, **__: object) -> None:
        raise AssertionError("it may do anything")


def test_a_generate_of_the_models_own_is_not_called() -> None:
    torch.manual_seed(0)
    model = OwnGenerate()
    tokens = greedy_tokens(model, [1, 2, 3], 5)["model"]
    wanted: list[int] = []
    for _ in range(5):
        wanted.append(int(model(torch.tensor([[1, 2, 3, *wanted]]))[0][0, -1].argmax()))
    assert tokens == wanted
    assert isinstance(tokens[1], int)
    model.config.eos_token_id = [tokens[1]]
    assert greedy_tokens(model, [1, 2, 3], 5)["model"] == tokens[: tokens.index(tokens[1]) + 1]
    model.head.bias.data[:] = float("nan")
    assert greedy_tokens(model, [1], 2)["model"] == [None, None]
    with pytest.raises(ModelError, match="can't generate: IndexError"):
        greedy_tokens(model, [20], 1)
