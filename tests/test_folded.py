"""Folding a shared expert: its algebra, what the target refuses and why, and the tables that choose tiles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from folded_blocks import DEEPSEEK, ROUTED, SPEC, SPECS, but
from hypothesis import given
from hypothesis import strategies as st
from spec_weights import weights, worst

from moe_surgery.errors import SurgeryError, UnsupportedError
from moe_surgery.kernels.arguments import WIDE_ROWS, Terms
from moe_surgery.kernels.choice import FOLDER, choose, serving, table
from moe_surgery.planning import deciding
from moe_surgery.spec import ExpertsSpec, MoESpec
from moe_surgery.targets import get_target, reference
from moe_surgery.targets.auto import AutoTarget
from moe_surgery.targets.base import Context, Refusal
from moe_surgery.targets.folded import fitness
from moe_surgery.targets.folded.fold import fold, terms_of
from moe_surgery.targets.folded.target import FoldedTarget
from moe_surgery.targets.shapes import check_shapes
from moe_surgery.targets.shared_as_experts import cut

CUDA = Context("cuda", "bfloat16", live=False)


@pytest.mark.parametrize("spec", [spec for spec in SPECS.values() if spec.shared], ids=str)
def test_slices_of_the_shared_expert_add_up_to_it(spec: MoESpec) -> None:
    """As further experts that every token visits, with the gate's weight, they give what the shared expert gives."""
    tensors, terms = weights(spec, torch.float64), terms_of(spec)
    shared13, shared2 = cut(tensors, spec)
    x = torch.randn(20, spec.hidden, dtype=torch.float64)
    out, gate = reference.shared_parts(tensors, x, reference.gated(spec.experts.activation), torch.float64)
    wanted = reference.shared_output(spec, out, gate)
    assert shared13.shape == (terms.slices, 2 * terms.width, terms.hidden)
    mix, got = reference.gated(spec.experts.activation), torch.zeros_like(wanted)
    for w13, w2 in zip(shared13, shared2, strict=True):
        got += mix(*(x @ w13.T).chunk(2, -1)) @ w2.T
    weight = (x @ tensors.shared_gate.T).sigmoid() if tensors.shared_gate is not None else 1.0
    assert worst(got * weight * terms.shared_scale, wanted) < 1e-13


def test_weights_are_taken_as_they_lie() -> None:
    tensors = weights(SPEC)
    made, terms = fold(tensors), terms_of(SPEC)
    assert made.w13.data_ptr() == tensors.w13.data_ptr() and made.shared_down is tensors.shared_down_proj
    at, size = made.offsets(), tensors.w13.element_size()
    found = [made.router.data_ptr() + at.gate * size, made.w13.data_ptr() + at.w13 * size]
    found += [found[1] + at.up * size, made.w2.data_ptr() + at.w2 * size]
    parts = (tensors.shared_gate, tensors.shared_gate_proj, tensors.shared_up_proj, tensors.shared_down_proj)
    assert found == [part.data_ptr() for part in parts if part is not None]
    assert tensors.shared_gate_proj is not None and tensors.shared_up_proj is not None
    both = torch.cat([tensors.shared_gate_proj, tensors.shared_up_proj])
    merged = replace(made, shared_gate=both, shared_up=None).offsets()
    assert merged.up == terms.slices * terms.width * terms.hidden


def test_tensors_of_another_spec_are_refused() -> None:
    with pytest.raises(SurgeryError, match=r"mlp: w13 has shape \(8, 32, 64\), the spec wants \(8, 48, 64\)"):
        check_shapes(but(experts={"width": 24}, shared={"width": 48}), weights(SPEC), "mlp")
    mixed = replace(weights(SPEC), w2=weights(SPEC).w2.half())
    with pytest.raises(SurgeryError, match=r"w2 is torch.float16 on cpu, the experts are torch.float32"):
        check_shapes(SPEC, mixed, "mlp")


@pytest.mark.parametrize("spec", [*SPECS.values(), *ROUTED.values()], ids=[*SPECS, *ROUTED])
def test_accepts_what_the_kernels_compute(spec: MoESpec) -> None:
    assert FoldedTarget().accepts(spec, CUDA) is None
    around = {"ranked in its own dtype", "identity experts", "output bias"}
    around |= {"shared expert of another width", "shared expert of another kind"}
    assert (FoldedTarget().remark(spec, CUDA) is None) is (spec not in [ROUTED[name] for name in around])


REMARKS = {
    "shared width 40 is not a multiple of the expert width 16 (2 × 16 leaves 8)": but(shared={"width": 40}),
    "the shared expert's activation is relu, the routed experts' silu": but(shared={"activation": "relu"}),
    "2 + 80 experts for each token are more than 64": but(shared={"width": 1280}),
    "router.scores_dtype = native is nothing that the folded kernels compute": but(scores_dtype="native"),
    "an output bias": replace(DEEPSEEK, output_bias=True),
    "the router's matrix is in float32, the shared expert's gate isn't": but(wide_matrix=True),
}


@pytest.mark.parametrize("reason", REMARKS)
def test_says_what_is_not_in_the_kernels(reason: str) -> None:
    assert FoldedTarget().accepts(REMARKS[reason], CUDA) is None
    assert FoldedTarget().remark(REMARKS[reason], CUDA) == f"in part by torch: {reason}"


REFUSED = {
    "its router is the model's own, which only its experts alone can be behind": but(scoring="own"),
    "expert activation tanh is none of the folded kernels': silu, gelu, gelu_tanh, relu, relu2": but(
        experts={"activation": "tanh"}
    ),
    "the router scores 8 experts, there are 6": but(experts={"num_experts": 6}),
    "top-9 of 8 experts": but(top_k=9),
    "65 experts for each token are more than 64": but(num_experts=80, top_k=65, experts={"num_experts": 80}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refuses_with_the_reason(reason: str) -> None:
    refusal = FoldedTarget().accepts(REFUSED[reason], CUDA)
    assert refusal is not None and refusal.reason == reason


def test_refuses_fields_that_it_has_never_heard_of() -> None:
    """A spec may grow; what it says then is refused until the kernels know of it, unless it says nothing."""

    @dataclass(frozen=True)
    class Grown(ExpertsSpec):
        twist: bool = field(default=False)

    for twist in (False, True):
        grown = replace(SPEC, experts=Grown(num_experts=8, width=16, activation="silu", twist=twist))
        assert (FoldedTarget().accepts(grown, CUDA) is None) is not twist


def test_refuses_other_devices_and_dtypes() -> None:
    target = FoldedTarget()
    found = [target.accepts(SPEC, context) for context in (Context("mps", "float32"), Context("cuda", "float8_e4m3fn"))]
    assert found[0] == Refusal("the folded kernels run on cuda and cpu; this model is on mps")
    assert found[1] == Refusal("dtype float8_e4m3fn is none of bfloat16, float16, float32")
    with pytest.raises(UnsupportedError, match="mlp: the folded kernels run on cuda and cpu; this model is on meta"):
        target.build(SPEC, weights(SPEC, device="meta"), prefix="mlp")


def test_says_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "find_spec", lambda name: None)
    fitness.missing.cache_clear()
    try:
        refusal = FoldedTarget().accepts(SPEC, Context("cuda", "bfloat16"))
    finally:
        fitness.missing.cache_clear()
    assert refusal == Refusal("the folded kernels need Triton, which isn't installed")


def test_auto_folds_on_cuda_and_says_why_where_it_does_not() -> None:
    auto = get_target("auto")
    assert isinstance(auto, AutoTarget)
    target, note = auto.pick(SPEC, CUDA)
    assert (target.name, note) == ("folded", None)
    target, note = auto.pick(but(shared={"width": 40}), CUDA)
    assert target.name == "folded" and note is not None and note.startswith("in part by torch: shared width")
    target, note = auto.pick(but(experts={"num_experts": 6}), CUDA)
    assert (target.name, note) == ("vllm", "not folded: the router scores 8 experts, there are 6")
    cpu = {dtype: auto.pick(SPEC, Context("cpu", dtype))[0].name for dtype in ("float32", "bfloat16", "float16")}
    assert cpu == {"float32": "folded", "bfloat16": "folded", "float16": "vllm"}
    assert auto.pick(replace(SPEC, shared=None), Context("cpu", "float32")) == (auto.layer, None)


def test_a_plan_names_the_chosen_target_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the GPU, as far as the plan can tell: its context says cuda."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    import moe_surgery

    monkeypatch.setattr(deciding, "Context", lambda device, dtype, live: Context("cuda", dtype, False))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    for shared in (32, 40):
        config = Qwen2MoeConfig(
            **sizes, vocab_size=32, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, shared_expert_intermediate_size=shared,
        )  # fmt: skip
        [step] = moe_surgery.plan(Qwen2MoeForCausalLM(config).eval(), packs=["generic"]).steps
        assert step.target == "folded"
        assert ("in part by torch: shared width 40" in step.reason) is (shared == 40)


TERMS = Terms(128, 6, 2, 1024, 384, "silu", False, True, 1.0, 1.0, True, True, False)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_tables_serve_every_number_of_tokens(path) -> None:
    rows = table(path.stem)
    numbers = [row.tokens for row in rows]
    assert numbers[0] == 1 and numbers == sorted(set(numbers))
    for row in rows:
        assert row.path in ("pairs", "grouped")
        tiles = (row.logits, row.gate_up, row.down)
        assert all(value & (value - 1) == 0 for tile in tiles for key, value in tile.items() if key.startswith("B"))
        assert "BK" in row.logits and {"BR", "BT"} & row.logits.keys() and all("num_warps" in tile for tile in tiles)


@given(st.integers(1, 100_000))
def test_the_row_below_serves(tokens: int) -> None:
    choice = choose(TERMS, tokens, torch.bfloat16)
    rows = table("H1024-E128-I384-K6-M2")
    assert choice in rows and choice.tokens <= tokens
    assert not any(choice.tokens < row.tokens <= tokens for row in rows)
    assert serving(rows, tokens) is choice


def test_shapes_and_dtypes_without_a_table_take_the_defaults() -> None:
    other = replace(TERMS, hidden=512)
    assert choose(other, 5, torch.float16) in table("default-16")
    assert choose(TERMS, 5, torch.float32) in table("default-32")
    assert TERMS.rows_dtype(WIDE_ROWS, torch.bfloat16) is torch.float32
    assert TERMS.rows_dtype(WIDE_ROWS + 1, torch.bfloat16) is torch.bfloat16


def test_experts_that_return_their_input_are_scored_and_have_no_weights() -> None:
    spec = ROUTED["identity experts"]
    check_shapes(spec, weights(spec), "mlp")
    with pytest.raises(SurgeryError, match=r"router has shape \(8, 64\), the spec wants \(10, 64\)"):
        check_shapes(spec, replace(weights(spec), router=weights(SPEC).router), "mlp")
