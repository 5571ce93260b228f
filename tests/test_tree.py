"""Where sparse-MoE blocks are looked for: in real architectures, in hand-made ones, and not in dense models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from zoo import plain

import moe_surgery
from moe_surgery.models.tree import find_sites
from moe_surgery.targets.base import SwappedBlock

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
MOE = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build(config_class: str, model_class: str, **changes: Any) -> nn.Module:
    """A tiny model of a transformers architecture, without weights."""
    config = getattr(transformers, config_class)(**{**TINY, **changes})
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, model_class)(config)
    return model


def paths(model: nn.Module) -> list[str]:
    return [site.path for site in find_sites(model)]


def layers(name: str, count: int = 2, first: int = 0) -> list[str]:
    return [f"model.layers.{number}.{name}" for number in range(first, count)]


@pytest.mark.parametrize(
    ("config_class", "model_class", "changes", "expected"),
    [
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 16}, layers("mlp")),
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {}, layers("mlp")),
        ("Qwen3NextConfig", "Qwen3NextForCausalLM", {"shared_expert_intermediate_size": 16}, layers("mlp")),
        ("MixtralConfig", "MixtralForCausalLM", {}, layers("mlp")),
        ("OlmoeConfig", "OlmoeForCausalLM", {}, layers("mlp")),
        (
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
             "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            layers("mlp", first=1),
        ),
        ("GptOssConfig", "GptOssForCausalLM", {}, layers("mlp")),
        ("GraniteMoeConfig", "GraniteMoeForCausalLM", {}, layers("block_sparse_moe")),
        ("PhimoeConfig", "PhimoeForCausalLM", {}, layers("mlp")),
        ("JambaConfig", "JambaForCausalLM", {"use_mamba_kernels": False}, layers("feed_forward", first=1)),
        ("Glm4MoeConfig", "Glm4MoeForCausalLM", {"n_routed_experts": 8, "first_k_dense_replace": 1},
         layers("mlp", first=1)),
        ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {}, layers("mlp")),
        ("Llama4TextConfig", "Llama4ForCausalLM", {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
         layers("feed_forward")),
    ],
    ids=lambda value: value.removesuffix("Config") if isinstance(value, str) and value.endswith("Config") else "",
)  # fmt: skip
def test_finds_every_block_of_a_sparse_model(
    config_class: str, model_class: str, changes: dict[str, Any], expected: list[str]
) -> None:
    assert paths(build(config_class, model_class, **{**MOE, **changes})) == expected


@pytest.mark.parametrize(
    ("config_class", "model_class", "changes"),
    [
        ("LlamaConfig", "LlamaForCausalLM", {}),
        ("Qwen3Config", "Qwen3ForCausalLM", {}),
        ("Gemma2Config", "Gemma2ForCausalLM", {}),
        ("WhisperConfig", "WhisperForConditionalGeneration",
         {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
          "pad_token_id": 0}),
        ("MambaConfig", "MambaForCausalLM", {"state_size": 8}),
        ("Wav2Vec2Config", "Wav2Vec2Model", {"conv_dim": (16,) * 7}),
        ("EncodecConfig", "EncodecModel", {"num_filters": 4, "codebook_size": 16, "codebook_dim": 8}),
    ],
    ids=lambda value: value.removesuffix("Config") if isinstance(value, str) and value.endswith("Config") else "",
)  # fmt: skip
def test_finds_nothing_in_a_dense_model(config_class: str, model_class: str, changes: dict[str, Any]) -> None:
    assert paths(build(config_class, model_class, **changes)) == []


def test_finds_talker_and_thinker_and_nothing_else_in_qwen3_omni(omni_dir: Any) -> None:
    from moe_surgery.models.opening import open_meta

    found = paths(open_meta(str(omni_dir)).module)
    assert found == [f"{part}.model.layers.{number}.mlp" for part in ("thinker", "talker") for number in (0, 1)]


class Model(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        for name, child in children.items():
            self.add_module(name, child)


def stack(*mlps: nn.Module) -> nn.Module:
    return Model(layers=nn.ModuleList(Model(mlp=mlp) for mlp in mlps))


@pytest.mark.parametrize("part", [*plain.ROUTERS, *plain.STORES, *plain.SHAREDS, *plain.WHOLES])
def test_finds_plain_blocks_however_they_are_stored(part: type[plain.Base]) -> None:
    make = plain.block_class(part)
    assert paths(stack(make(), plain.MLP(32, 48), make())) == ["layers.0.mlp", "layers.2.mlp"]


class PointwiseMLP(nn.Module):
    """An MLP of convolutions over one place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(32, 48, 1), nn.Conv1d(48, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(x.t()[None]).relu())[0].t()
        return out


@pytest.mark.parametrize(
    ("experts", "outcome"), [([plain.MLP(32, 48)], "refused"), ([PointwiseMLP() for _ in range(4)], "missed")]
)
def test_one_expert_and_experts_of_convolutions_are_listed(experts: list[nn.Module], outcome: str) -> None:
    class Routing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, len(experts), bias=False)
            self.experts = nn.ModuleList(experts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            t = x.reshape(-1, 32)
            weights, ids = self.gate(t).softmax(-1).topk(1)
            out = torch.zeros_like(t)
            for e, expert in enumerate(self.experts):
                rows, slot = torch.where(ids == e)
                out.index_add_(0, rows, expert(t[rows]) * weights[rows, slot, None])
            return out.reshape(x.shape)

    [step] = moe_surgery.apply(stack(Routing()).eval(), target="reference").steps
    assert (step.path, step.outcome) == ("layers.0.mlp", outcome) and step.reason


class ImageMLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 8, 3, padding=1))


class MixedImages(nn.Module):
    """Experts of convolutions over several places, behind one that scores places or a layer that scores images."""

    def __init__(self, name: str, *, scores_places: bool) -> None:
        super().__init__()
        self.scorer: nn.Module = nn.Conv2d(8, 4, 1) if scores_places else nn.Linear(8, 4)
        self.add_module(name, nn.ModuleList(ImageMLP() for _ in range(4)))
        self.name, self.scores_places = name, scores_places

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (
            self.scorer(images) if self.scores_places else self.scorer(images.mean((2, 3)))[..., None, None]
        )
        return out

    def weights(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(images).softmax(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weights = self.weights(images)
        parts = [expert(images) * weights[:, e, None] for e, expert in enumerate(getattr(self, self.name))]
        return torch.stack(parts).sum(0)


class RoutedImages(MixedImages):
    def weights(self, images: torch.Tensor) -> torch.Tensor:
        weights, ids = super().weights(images).topk(2, dim=1)
        return torch.zeros_like(self.logits(images)).scatter(1, ids, weights)


@pytest.mark.parametrize("scores_places", [True, False])
@pytest.mark.parametrize("name", ["experts", "branches"])
def test_experts_that_take_images_are_listed_with_that_reason(name: str, scores_places: bool) -> None:
    model = stack(RoutedImages(name, scores_places=scores_places)).eval()
    assert model.get_submodule("layers.0.mlp")(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)
    [step] = moe_surgery.plan(model).steps
    assert (step.path, step.outcome) == ("layers.0.mlp", "missed")
    first = "scorer (Conv2d)" if scores_places else f"{name}.0.0 (Conv2d)"
    assert step.reason == f"it takes channels before places, as {first} does, and no tokens [..., H]"


@pytest.mark.parametrize("make", [PointwiseMLP, lambda: plain.MLP(32, 48)], ids=["convolutions", "layers"])
def test_tokens_behind_their_channels_are_told_from_tokens(make: Callable[[], nn.Module]) -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4, bias=False)
            self.experts = nn.ModuleDict({f"e{n}": make() for n in range(4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            t = x.transpose(1, 2).reshape(-1, 32)
            weights, ids = self.gate(t).softmax(-1).topk(1)
            dense = torch.zeros(len(t), 4).scatter(1, ids, weights)
            done = sum(expert(t) * dense[:, n, None] for n, expert in enumerate(self.experts.values()))
            return done.view(x.shape[0], -1, 32).transpose(1, 2)

    model, x = stack(plain.make(Behind)).eval(), torch.randn(2, 32, 5)
    before = model.get_submodule("layers.0.mlp")(x)
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "replaced", step.reason
    torch.testing.assert_close(model.get_submodule("layers.0.mlp")(x), before)


def test_convolutions_of_which_none_is_chosen_are_no_site() -> None:
    assert not moe_surgery.plan(stack(MixedImages("branches", scores_places=True)).eval()).steps


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.ModuleList(plain.MLP(32, 48) for _ in range(4)),
        lambda: Model(layers=nn.ModuleList(Model(mlp=plain.MLP(32, 48)) for _ in range(4)), head=nn.Linear(32, 5)),
        lambda: Model(heads=nn.ModuleList(nn.Linear(32, 16) for _ in range(8))),
        lambda: Model(codebooks=nn.ModuleList(nn.Embedding(16, 8) for _ in range(8))),
        lambda: Model(a=nn.Conv1d(8, 8, 3), b=nn.Conv1d(8, 8, 3)),
        lambda: Model(tower=nn.ModuleList(PointwiseMLP() for _ in range(4)), head=nn.Linear(32, 5)),
        lambda: Model(rnn=nn.LSTM(8, 8, 2), attention=nn.MultiheadAttention(8, 2)),
    ],
    ids=["list of MLPs", "layers", "heads", "codebooks", "convolutions", "pointwise tower", "recurrent"],
)
def test_finds_nothing_in_dense_modules(module: Callable[[], nn.Module]) -> None:
    assert paths(module()) == []


def test_a_swapped_block_is_a_site_and_nothing_inside_it_is() -> None:
    class Swapped(SwappedBlock):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain.block_class()()

    assert paths(stack(Swapped(), plain.block_class()())) == ["layers.0.mlp", "layers.1.mlp"]


@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        ("kimi_linear", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("nllb_moe", ["q_proj", "k_proj", "v_proj", "out_proj"]),
        ("vitpose_backbone", ["dense"]),
    ],
)
def test_low_rank_layers_beside_others_are_no_experts_and_score_none(family: str, adapted: list[str]) -> None:
    """Four equal layers, of which each has a matrix with four rows beside it now."""
    from peft import LoraConfig, get_peft_model

    model, _ = moe_surgery.testing.build(family)
    before = paths(model)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=adapted))
    assert [path.removeprefix("base_model.model.") for path in paths(wrapped)] == before != []


def test_the_order_is_that_of_the_module_tree() -> None:
    make = plain.block_class()
    assert paths(Model(z=make(), a=make(), m=stack(make()))) == ["z", "a", "m.layers.0.mlp"]


def test_ordinary_layers_of_many_equal_matrices_are_no_sites() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q", "k", "v", "o"):
                setattr(self, name, nn.Linear(64, 64))
            self.heads = nn.Linear(64, 8)  # a gate for each head
            self.towers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)))
            self.bias = nn.Parameter(torch.zeros(4, 7, 7))
            self.conv = nn.Conv1d(8, 8, 3)

    layers = nn.ModuleList(nn.Sequential(Attention(), nn.LSTM(8, 8), nn.Linear(64, 256)) for _ in range(4))
    assert find_sites(nn.ModuleDict({"layers": layers, "head": nn.Linear(64, 12)})) == ()


class Mixing(nn.Module):
    """Two MLPs side by side, and a small layer; ``mix`` says what comes of them."""

    def __init__(self, mix: Callable[..., torch.Tensor], scores: int = 2) -> None:
        super().__init__()
        self.weigh, self.mix = nn.Linear(32, scores), mix
        self.words, self.images = plain.MLP(32, 48), plain.MLP(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.weigh(x), self.words(x), self.images(x))


class WordsOrImagesExpert(nn.Module):
    """Two MLPs, of which a mask chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.images = plain.MLP(32, 48), plain.MLP(32, 48)

    def forward(self, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.where(images[..., None], self.images(x), self.words(x))


def test_experts_that_a_mask_chooses_are_listed_and_those_of_two_mlps_are_not() -> None:
    [step] = moe_surgery.plan(stack(WordsOrImagesExpert()).eval()).steps
    assert (step.path, step.outcome) == ("layers.0.mlp", "missed")
    assert "its forward takes (x: 'torch.Tensor', images: 'torch.Tensor'), not one tensor" in step.reason
    block = plain.make(plain.block_class(plain.ListOfMLPs, name="Block"))
    block.experts = nn.ModuleList(WordsOrImagesExpert() for _ in block.experts)
    assert paths(stack(block)) == ["layers.0.mlp"]
    experts = WordsOrImagesExpert()
    experts.more = plain.MLP(32, 48)
    assert paths(stack(Model(gate=plain.linear(32, 3), inner=experts))) == ["layers.0.mlp"]  # what routes to them


class OfModalities(nn.Module):
    """MLPs of which an argument names one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.images = plain.MLP(32, 48), plain.MLP(32, 48)

    def forward(self, x: torch.Tensor, kind: str | None = None) -> torch.Tensor:
        if kind == "images":
            return self.images(x)
        return self.words(x)


class OneAfterTheOther(OfModalities):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.words(x)
        if mask is not None:
            x = x * mask
        return self.images(x)


class OfPlaces(OfModalities):
    """Its two MLPs compute the tokens at places that it is given (BAGEL)."""

    def forward(self, x: torch.Tensor, of_words: torch.Tensor | None = None) -> torch.Tensor:
        return self.of_places(x, x[..., 0] > 0 if of_words is None else of_words)

    def of_places(self, x: torch.Tensor, of_words: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        out[of_words] = self.words(x[of_words])
        out[~of_words] = self.images(x[~of_words])
        return out


class OfEnds(OfModalities):
    """One MLP computes the first tokens, and another the others."""

    def forward(self, x: torch.Tensor, first: int = 3) -> torch.Tensor:
        out = torch.zeros_like(x)
        out[:, :first] = self.words(x[:, :first])
        out[:, first:] = self.images(x[:, first:])
        return out


class BestHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(32, 32))
        self.score = nn.Linear(32, 4, bias=False)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.heads(x)
        weights, ids = self.score(x).softmax(-1).topk(2, -1)
        kept = torch.zeros_like(heads[..., 0]).scatter(-1, ids, weights)
        return self.o((heads * kept[..., None]).flatten(-2))


class AllHeads(BestHeads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o((self.heads(x) * self.score(x).sigmoid()[..., None]).flatten(-2))


class Grouped(nn.Module):
    """Experts that are groups of the channels of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.up, self.down = nn.Conv1d(128, 192, 1, groups=4), nn.Conv1d(192, 128, 1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.reshape(-1, 32)
        weights, ids = self.gate(t).softmax(-1).topk(2)
        done = self.down(self.up(t.repeat(1, 4)[..., None]).relu()).view(-1, 4, 32)
        return (done.gather(1, ids[..., None].expand(-1, -1, 32)) * weights[..., None]).sum(1).view(x.shape)


class Slots(nn.Module):
    """Experts whose inputs are sums of many tokens, and a token's output one of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(4, 3, 32))
        self.bank = Model(experts=nn.ModuleList(plain.MLP(32, 48) for _ in range(4)))
        self.bank.forward = lambda x: torch.stack([each(x[:, n]) for n, each in enumerate(self.bank.experts)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("bsh,ekh->bsek", x, self.slots)
        done = self.bank(torch.einsum("bsh,bsek->bekh", x, logits.softmax(1)))
        return torch.einsum("bekh,bsek->bsh", done, logits.flatten(2).softmax(-1).view(logits.shape))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Slots, "it has no top-k; nor its experts alone (bank): norm.weight takes no part in what was read"),
        (OfModalities, "it has no top-k: kind, an argument, says which of words, images computes"),
        (OfPlaces, "it has no top-k: of_words and ~of_words say which tokens each of words, images computes"),
        (BestHeads, "what it takes the best of, scored by score, are heads of attention, which mix tokens"),
        (Grouped, "it convolves over several places, or some of its channels (conv1d)"),
        (
            lambda: Mixing(lambda s, a, b: torch.where(s > 0, a * s, b * (1 - s)), 1),
            "it has no top-k: which of its experts counts is told by comparing what it computes with a number",
        ),
    ],
    ids=["slots", "an argument", "places", "heads", "groups", "a threshold"],
)
def test_what_else_chooses_among_experts_is_listed(module: Callable[[], nn.Module], reason: str) -> None:
    [step] = moe_surgery.plan(stack(module()).eval()).steps
    assert (step.path, step.outcome, step.reason) == ("layers.0.mlp", "missed", reason)


@pytest.mark.parametrize(
    "module",
    [OneAfterTheOther, OfEnds, AllHeads, lambda: Mixing(lambda s, a, b: torch.where(s > 0, a, a + 1) + b, 1)],
    ids=["one after the other", "ends", "all heads", "a threshold of something else"],
)
def test_equal_layers_of_which_none_is_chosen_are_no_site(module: Callable[[], nn.Module]) -> None:
    assert not moe_surgery.plan(stack(module()).eval()).steps


MIXED: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "softmax": (lambda s, a, b: s.softmax(-1)[..., :1] * a + s.softmax(-1)[..., 1:] * b, 2),
    "sigmoid": (lambda s, a, b: s.sigmoid() * a + (1 - s.sigmoid()) * b, 1),
    "stacked": (lambda s, a, b: (torch.stack([a, b], -2) * s.softmax(-1)[..., None]).sum(-2), 2),
}
UNMIXED: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "sum": (lambda s, a, b: a + b, 2),
    "gated sum": (lambda s, a, b: s.sigmoid() * (a + b.tanh()), 1),
    "one weighted": (lambda s, a, b: s.sigmoid() * a + b, 1),
    "constant weights": (lambda s, a, b: 0.3 * a + 0.7 * b, 2),
    "product": (lambda s, a, b: a * b, 2),
    "heads": (lambda s, a, b: torch.cat([s, a, b], -1), 2),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_mlps_that_are_mixed_are_listed_with_that_reason(name: str) -> None:
    [step] = moe_surgery.plan(stack(Mixing(*MIXED[name])).eval()).steps
    assert (step.path, step.outcome) == ("layers.0.mlp", "missed")
    assert step.reason == "it has no top-k: every token goes through all of its experts, and each has a weight"


@pytest.mark.parametrize("name", UNMIXED)
def test_two_mlps_that_are_not_mixed_are_no_site(name: str) -> None:
    assert not moe_surgery.plan(stack(Mixing(*UNMIXED[name])).eval()).steps
