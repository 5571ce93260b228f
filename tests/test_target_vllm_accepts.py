"""What the vLLM target takes, what it refuses and why, and which vLLM it recognises."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from spec_weights import weights
from vllm_blocks import DTYPES, SPEC, TARGET, build

from moe_surgery.errors import SurgeryError, UnsupportedError
from moe_surgery.spec import MoESpec
from moe_surgery.targets.base import Context
from moe_surgery.targets.vllm import VllmTarget, eras
from moe_surgery.targets.vllm.installed_kernels import Kernels

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepted_sizes_are_those_that_build(dtype: torch.dtype) -> None:
    context, builder = Context("cpu", str(dtype).removeprefix("torch.")), TARGET._builder
    for hidden in (*range(8, 136, 8), 100, 1000, 1024):
        spec = replace(SPEC, hidden=hidden)
        refusal = TARGET.accepts(spec, context)
        if refusal is None:
            assert hidden % 32 == 0
            TARGET.build(spec, weights(spec, dtype), prefix="mlp")
        else:
            assert refusal.reason.startswith(f"hidden size {hidden} is not a multiple of 32, which vLLM ")
            with pytest.raises(NotImplementedError):
                builder.FusedLayer(spec, weights(spec, dtype), "mlp")
            with pytest.raises(UnsupportedError, match=f"mlp: hidden size {hidden} is not"):
                TARGET.build(spec, weights(spec, dtype), prefix="mlp")


def refused(spec: MoESpec = SPEC, device: str = "cpu", dtype: str = "float32", target: VllmTarget = TARGET) -> str:
    refusal = target.accepts(spec, Context(device, dtype))
    assert refusal is not None
    return refusal.reason


def test_refusals_say_why() -> None:
    assert refused(device="cuda") == "vLLM's layer is hosted in a plain model on cpu only; this one is on cuda"
    assert refused(dtype="float64") == "dtype float64 is none of float32, bfloat16, float16"
    assert refused(replace(SPEC, hidden=40)).startswith("hidden size 40 is not a multiple of 32")
    assert refused(replace(SPEC, router=replace(SPEC.router, top_k=9))) == "top-9 of 8 experts"
    assert refused(replace(SPEC, router=replace(SPEC.router, num_experts=9))).startswith("the router scores 9 experts")


def test_experts_that_choose_for_themselves_compute_what_kernels_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of releases before 0.30 do, for which this one's stand with their class exchanged."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic

    relu = replace(SPEC, experts=replace(SPEC.experts, activation="relu"))
    for experts in (None, FusedMoEExpertsMonolithic):
        monkeypatch.setattr(cpu_moe, "CPUUnquantizedExperts", experts)
        assert "they have no function for these experts, and choose" in refused(relu, target=VllmTarget())
    monkeypatch.undo()
    assert VllmTarget().accepts(relu, Context("cpu", "float32")) is None


def test_kernels_that_are_missing_are_a_refusal() -> None:
    def fail(*args: object) -> None:
        raise AttributeError("'_OpNamespace' '_C' object has no attribute 'prepack_moe_weight'")

    builder = types.SimpleNamespace(platform=lambda: "cpu", check=lambda *args: None, FusedLayer=fail)
    reason = Kernels(builder, "cpu", torch.float32, "vLLM's kernels").objection(SPEC)
    assert reason is not None and reason.startswith("vLLM's kernels fail on this machine: '_OpNamespace'")
    builder.platform = lambda: "cuda"
    assert Kernels(builder, "cpu", torch.float32, "the kernels").objection(SPEC) == "the kernels were built for cuda"


def test_shapes_that_do_not_fit_the_spec_are_an_error() -> None:
    tensors = weights(SPEC)
    for change, message in (
        ({"w13": tensors.w13.transpose(1, 2)}, r"mlp: w13 has shape \(8, 64, 96\), the spec wants \(8, 96, 64\)"),
        ({"shared_gate": None}, r"mlp: shared_gate has shape None, the spec wants \(1, 64\)"),
        ({"router": tensors.router.bfloat16()}, "mlp: router is torch.bfloat16 on cpu, the experts are torch.float32"),
    ):
        with pytest.raises(SurgeryError, match=message):
            TARGET.build(SPEC, replace(tensors, **change), prefix="mlp")


def layers(**names: object) -> types.ModuleType:
    module = types.ModuleType("layers")
    vars(module).update(names)
    return module


class SomeLayer:
    pass


@pytest.mark.parametrize(
    "names, era",
    [
        ({"FusedMoE": SomeLayer, "SharedFusedMoE": SomeLayer}, "A"),
        ({"FusedMoE": SomeLayer}, "B"),
        ({"FusedMoE": SomeLayer, "RoutedExperts": SomeLayer}, "B"),
        ({"FusedMoE": lambda: None, "RoutedExperts": SomeLayer}, "C"),
        ({"FusedMoEFactory": lambda: None}, "D"),
        ({"SomethingElse": SomeLayer}, None),
    ],
)
def test_eras_are_told_apart_by_their_names(names: dict[str, object], era: str | None) -> None:
    found = eras.era_of(layers(**names))
    assert (found and found.name) == era


def test_the_function_that_makes_runners_had_another_name() -> None:
    """Releases 0.20 to 0.26 are built for as the installed one is; none of them can be installed beside it."""
    named_as = {era.name: era for era in eras.ERAS}
    assert named_as["B"].builder == named_as["C"].builder == named_as["D"].builder
    target = VllmTarget()
    target.installed = target.listed = eras.Installed("0.26", named_as["C"])
    named = "expert width 48 is not a multiple of 32, which vLLM 0.26's CPU kernels require"
    refusal = target.accepts(SPEC, Context("cpu", "float32", live=False))
    assert refusal is not None and refusal.reason == named
    assert (
        target.accepts(replace(SPEC, experts=replace(SPEC.experts, width=32)), Context("cpu", "float32", live=False))
        is None
    )


@pytest.mark.parametrize("era", [era for era in eras.ERAS if era.builder is None], ids=lambda era: era.name)
def test_other_eras_are_recognised_and_refused(era: eras.Era) -> None:
    target = VllmTarget()
    target.installed = eras.Installed("0.99", era)
    wanted = f"vLLM 0.99: era {era.name} ({era.layer}) is recognised but not supported; releases {era.releases} "
    wanted += "want a transformers older than this library does"
    assert refused(target=target) == wanted
    with pytest.raises(UnsupportedError, match="recognised but not supported"):
        target.build(SPEC, weights(SPEC), prefix="mlp")
    assert target.label.startswith("vLLM ")


def test_an_unknown_vllm_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = {"vllm": types.SimpleNamespace(__version__="9.9"), eras.LAYERS: layers()}
    monkeypatch.setattr(eras.importlib, "import_module", imported.__getitem__)
    with pytest.raises(UnsupportedError, match="vLLM 9.9: .* has none of the MoE layers known here") as caught:
        VllmTarget().accepts(SPEC, Context("cpu", "float32"))
    assert caught.value.exit_code == 14


def test_the_installed_vllm_is_labelled() -> None:
    assert TARGET.label == build().label == "vLLM FusedMoE"


def test_the_table_and_the_kernels_agree() -> None:
    """A plan made from a config asks the table; what is built asks the kernels. Neither may promise more."""
    assert eras.look_up() == eras.detect()
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        for hidden in (16, 32, 40, 64):
            spec = replace(SPEC, hidden=hidden, experts=replace(SPEC.experts, activation=activation))
            asked = TARGET.accepts(spec, Context("cpu", "bfloat16"))
            listed = TARGET.accepts(spec, Context("cpu", "bfloat16", live=False))
            assert (asked is None) == (listed is None), (activation, hidden, asked, listed)


def test_planning_from_a_config_does_not_import_the_engine() -> None:
    code = (
        "import sys; from moe_surgery.spec import *; from moe_surgery.targets.base import Context;"
        "from moe_surgery.targets.vllm import VllmTarget;"
        "spec = MoESpec(64, RouterSpec(8, 2, 'softmax', True), ExpertsSpec(8, 32, 'silu'), None);"
        "assert VllmTarget().accepts(spec, Context('cpu', 'float32', live=False)) is None;"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
