"""Reading plain blocks: whatever their spelling, they are read as what they compute."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from zoo import plain
from zoo.plain import Sizes, block_class
from zoo.same import assert_reads_right

from moe_surgery.read.block import read
from moe_surgery.read.reading import Unreadable
from moe_surgery.spec import ExpertsSpec, MoESpec, RouterSpec, SharedSpec

SIZES = Sizes(experts=4)
PLAIN = MoESpec(
    hidden=32,
    router=RouterSpec(num_experts=4, top_k=2, scoring="softmax", renormalize=True),
    experts=ExpertsSpec(num_experts=4, width=16, activation="silu"),
    shared=SharedSpec(width=32, activation="silu", gate="sigmoid"),
)
ROUTERS: dict[type[plain.Base], dict[str, Any]] = {
    plain.SoftmaxFirst: {},
    plain.NotRenormalised: {"renormalize": False},
    plain.InPlaceRenormalised: {},
    plain.SoftmaxLast: {"ranks": "logits", "ranked_dtype": "native", "scores_dtype": "native"},
    plain.Gathered: {"scoring": "sigmoid", "scale": 2.5},
    plain.SigmoidOfChosen: {
        "scoring": "sigmoid",
        "renormalize": False,
        "ranks": "logits",
        "ranked_dtype": "native",
        "scores_dtype": "native",
    },
    plain.BareRouter: {},
    plain.Float32Router: {"logits_dtype": "float32"},
    plain.TransposedRouter: {},
}
SHAREDS: dict[type[plain.Base], SharedSpec | None] = {
    plain.SharedMLP: PLAIN.shared,
    plain.SharedPacked: PLAIN.shared,
    plain.SharedBare: PLAIN.shared,
    plain.SharedUngated: SharedSpec(width=32, activation="silu", gate=None),
    plain.NoShared: None,
}
ACTS = {plain.Gelu: "gelu", plain.GeluTanh: "gelu_tanh", plain.Relu: "relu"}


def make(cls: Callable[..., nn.Module], dtype: torch.dtype = torch.float32, sizes: Sizes = SIZES) -> nn.Module:
    return plain.make(lambda: cls(sizes), dtype=dtype)


def without_precision(spec: MoESpec) -> MoESpec:
    return replace(spec, router=replace(spec.router, logits_dtype="native", weights_dtype="native"))


def test_every_part_has_its_expectation() -> None:
    assert set(ROUTERS) == set(plain.ROUTERS)
    assert set(SHAREDS) == set(plain.SHAREDS)


@pytest.mark.parametrize("part", plain.ROUTERS)
def test_routers(part: type[plain.Base]) -> None:
    block = make(block_class(part))
    reading = read(block)
    expected = replace(PLAIN.router, **ROUTERS[part])
    # Where a precision isn't named above, spelling decides it; numbers tell whether it is right.
    given = {name: getattr(reading.spec.router, name) for name in ("logits_dtype", "weights_dtype")}
    assert reading.spec.router == replace(expected, **{**given, **ROUTERS[part]})
    assert_reads_right(block, reading)


@pytest.mark.parametrize("part", [*plain.STORES, *plain.DISPATCHES, *plain.FORWARDS, *plain.WHOLES])
def test_stores_dispatches_forwards_and_whole_blocks(part: type[plain.Base]) -> None:
    block = make(block_class(part))
    reading = read(block)
    assert without_precision(reading.spec) == PLAIN
    assert_reads_right(block, reading)


@pytest.mark.parametrize("part", plain.SHAREDS)
def test_shared_experts(part: type[plain.Base]) -> None:
    block = make(block_class(part))
    reading = read(block)
    assert reading.spec.shared == SHAREDS[part]
    assert_reads_right(block, reading)


@pytest.mark.parametrize("part", plain.ACTS)
@pytest.mark.parametrize("store", [plain.Packed, plain.ListOfMLPs])
def test_activations(part: type[plain.Base], store: type[plain.Base]) -> None:
    block = make(block_class(part, store))
    reading = read(block)
    assert reading.spec.experts.activation == ACTS.get(part, "silu")
    assert_reads_right(block, reading)


@pytest.mark.parametrize("patch", plain.PATCHES)
def test_forwards_patched_onto_an_instance(patch: Callable[[Any], None]) -> None:
    block = make(block_class())
    patch(block)
    reading = read(block)
    assert without_precision(reading.spec) == PLAIN
    assert_reads_right(block, reading)


@pytest.mark.parametrize("store", plain.STORES)
def test_layouts_name_every_weight(store: type[plain.Base]) -> None:
    block = make(block_class(store, plain.GatherBmm))
    reading = read(block)
    assert reading.layout.paths() == set(dict(block.named_parameters()))
    assert (reading.layout.packed is not None) == (store is plain.Packed)
    assert_reads_right(block, reading)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(k=1),
        Sizes(experts=4, k=4),
        Sizes(experts=1, k=1),
        Sizes(hidden=8, experts=8, k=2, width=8, shared=8),
        Sizes(experts=3, k=2, width=1, shared=1),
        Sizes(hidden=15, experts=5, k=3, width=7, shared=143),
        Sizes(hidden=3, experts=15, k=5, width=35, shared=143),
        Sizes(experts=64, k=6, width=8, shared=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("dispatch", [plain.OneHotLoop, plain.DenseBmm])
def test_sizes(sizes: Sizes, dispatch: type[plain.Base]) -> None:
    block = make(block_class(dispatch), sizes=sizes)
    reading = read(block)
    spec = reading.spec
    assert (spec.hidden, spec.router.num_experts, spec.router.top_k) == (sizes.hidden, sizes.experts, sizes.k)
    assert spec.shared is not None
    assert (spec.experts.width, spec.shared.width) == (sizes.width, sizes.shared)
    assert_reads_right(block, reading, sizes.hidden)


@pytest.mark.parametrize("router", [plain.SoftmaxFirst, plain.Float32Router])
def test_dtypes_are_read_alike(router: type[plain.Base]) -> None:
    cls = block_class(router)
    expected = read(make(cls))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert read(make(cls, dtype=dtype)) == expected


def test_what_is_ranked_and_in_which_dtype() -> None:
    def ranked(**methods: Any) -> tuple[str, ...]:
        spec = read(make(block_class(type("Ranked", (plain.Base,), methods)))).spec.router
        return spec.ranks, spec.logits_dtype, spec.scores_dtype, spec.ranked_dtype

    def top(scores: Any, values: Any) -> Any:
        ids = scores.topk(2, -1).indices
        return values.gather(1, ids), ids

    def by(rank: Any, score: Any) -> dict[str, Any]:
        return {"route": lambda self, x: top(rank(self.logits(x)), score(self.logits(x)))}

    def wide(logits: Any) -> Any:
        return logits.float().softmax(-1)

    def narrow(logits: Any) -> Any:
        return logits.softmax(-1)

    logits = {"logits": lambda self, x: torch.nn.functional.linear(x.float(), self.gate.weight.float())}
    assert ranked(**by(wide, wide)) == ("scores", "native", "float32", "float32")
    assert ranked(**by(narrow, narrow)) == ("scores", "native", "native", "native")
    assert ranked(**by(lambda it: it, wide)) == ("logits", "native", "float32", "native")
    assert ranked(**by(lambda it: it.float(), narrow)) == ("logits", "native", "native", "float32")
    assert ranked(**logits, **by(lambda it: it, wide)) == ("logits", "float32", "float32", "float32")
    # Rounded on the way: to what is ranked, or to both.
    taken = {"route": lambda self, x: top(self.logits(x).to(x.dtype), wide(self.logits(x)))}
    assert ranked(**logits, **taken) == ("logits", "float32", "float32", "native")
    both = {"route": lambda self, x: top(self.logits(x).to(x.dtype), wide(self.logits(x).to(x.dtype)))}
    assert ranked(**logits, **both) == ("logits", "native", "float32", "native")
    scores = {"route": lambda self, x: top(wide(self.logits(x)).to(x.dtype), wide(self.logits(x)))}
    assert ranked(**scores) == ("scores", "native", "float32", "native")
    only = {"route": lambda self, x: top(self.logits(x), wide(self.logits(x).to(x.dtype)))}
    with pytest.raises(Unreadable, match="rounded on the way to its scores or its ranking, and not on both"):
        ranked(**logits, **only)


def test_precisions() -> None:
    def router(cls: type[plain.Base]) -> tuple[str, str]:
        spec = read(make(block_class(cls))).spec.router
        return spec.logits_dtype, spec.weights_dtype

    class Float32Weights(plain.SoftmaxFirst):
        def routed(self, x: Any, weights: Any, ids: Any) -> Any:
            return super().routed(x, weights.float(), ids)

        def route(self, x: Any) -> Any:
            weights, ids = self.logits(x).softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)
            return weights / weights.sum(-1, keepdim=True), ids

    assert router(plain.SoftmaxFirst) == ("native", "native")
    assert router(plain.Float32Router) == ("float32", "native")
    assert router(Float32Weights) == ("native", "float32")


def test_weights_on_the_meta_device_are_read_alike() -> None:
    cls = block_class(plain.ListOfMLPs, plain.SortedNumpy)
    with torch.device("meta"):
        block = cls(SIZES).eval()
    assert read(block) == read(make(cls))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes_make_no_difference(context: Callable[[], Any]) -> None:
    block = make(block_class()).requires_grad_(True)
    with context():
        assert without_precision(read(block).spec) == PLAIN


def test_reading_leaves_nothing_behind() -> None:
    block = make(block_class(plain.ListOfMLPs))
    random.seed(0)
    torch.manual_seed(0)
    before = {name: (p.data_ptr(), p.clone(), p.requires_grad) for name, p in block.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in block.named_modules()}
    states = random.getstate(), torch.get_rng_state()
    read(block)
    for name, parameter in block.named_parameters():
        pointer, values, grad = before[name]
        assert (parameter.data_ptr(), parameter.requires_grad) == (pointer, grad)
        assert torch.equal(parameter, values)
    assert {name: set(vars(module)) for name, module in block.named_modules()} == attributes
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_formula_and_children_are_in_the_blocks_own_names() -> None:
    reading = read(make(block_class(plain.ListOfMLPs)))
    assert reading.combine == "experts + sigmoid(shared_expert_gate) * shared_expert"
    shapes = {name: str(shape) for name, shape in reading.children}
    assert shapes == {"gate": "4 32", "experts": "4 16 32", "shared_expert": "mlp 32 32", "shared_expert_gate": "1 32"}


def test_transformers_kernels_are_looked_through() -> None:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    readings = []
    for kernel in ("eager", "batched_mm", "grouped_mm"):
        config = Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=32, norm_topk_prob=True)
        config._experts_implementation = kernel
        block = make(lambda _, config=config: Qwen2MoeSparseMoeBlock(config))
        readings.append(read(block))
        assert all("forward" not in vars(module) for module in block.modules())
    assert without_precision(readings[0].spec) == PLAIN
    assert readings[0] == readings[1] == readings[2]


def test_a_module_without_weights_or_without_experts_has_a_reason() -> None:
    with pytest.raises(Unreadable, match="no weights"):
        read(nn.SiLU())
    with pytest.raises(Unreadable, match="no top-k"):
        read(plain.MLP(SIZES.hidden, SIZES.width))
    with pytest.raises(Unreadable, match="could not be followed"):
        read(nn.Embedding(4, 3))


def test_an_error_of_the_blocks_own_is_told() -> None:
    class Broken(plain.Base):
        def forward(self, hidden_states: Any) -> Any:
            raise KeyError("nothing here")

    with pytest.raises(Unreadable, match="KeyError: 'nothing here'"):
        read(make(block_class(Broken)))
