"""What stands around a block: models ask about it, hold parts of it, or write its weights; none silently wrong."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import talking_models as talking
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from talking_models import IDS, Block, Layer
from torch import Tensor, nn

import moe_surgery
from moe_surgery.errors import ProofError, SurgeryError
from moe_surgery.report.report import Report

TOLERANCE = 1e-5  # float32: some twenty roundings of 6e-8 each, through two layers


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def apply(model: nn.Module, **how: Any) -> Report:
    return moe_surgery.apply(model, target="reference", **how)


def right(model: nn.Module, **how: Any) -> Report | None:
    """Operate; whatever comes of it, the model must compute the same. None if it was rolled back."""
    before = outputs(model)
    try:
        report = apply(model, **how)
    except SurgeryError:
        assert torch.equal(outputs(model), before)
        return None
    after = outputs(model)
    assert float((after - before).norm() / before.norm()) < TOLERANCE
    if how.get("undoable", True):
        moe_surgery.undo(report)
        assert torch.equal(outputs(model), before)
    return report


ANSWERED: dict[str, talking.Step] = {
    "isinstance": lambda layer, x: layer.mlp(x) if isinstance(layer.mlp, Block) else 0 * x,
    "class": lambda layer, x: layer.mlp(x) if layer.mlp.__class__ is Block else 0 * x,
    "attribute": lambda layer, x: layer.mlp(x) * layer.mlp.num_experts + layer.mlp.aux_loss,
    "property": lambda layer, x: layer.mlp(x) * layer.mlp.top_k,
    "config": lambda layer, x: layer.mlp(x) * layer.mlp.config.k,
    "method": lambda layer, x: layer.mlp(x) * layer.mlp.doubled(),
    "class attribute": lambda layer, x: layer.mlp(x) * layer.mlp.factor,
    "number of children": lambda layer, x: layer.mlp(x) * len(layer.mlp.experts),
    "child's attribute": lambda layer, x: layer.mlp(x) / layer.mlp.experts[1].g.in_features,
    "hasattr": lambda layer, x: layer.mlp(x) if hasattr(layer.mlp, "experts") else 0 * x,
    "hasn't": lambda layer, x: 0 * x if hasattr(layer.mlp, "shared_expert") else layer.mlp(x),
    "forward": lambda layer, x: layer.mlp.forward(x),
    "twice": lambda layer, x: layer.mlp(x) + layer.mlp(2 * x),
}


@pytest.mark.parametrize(
    ("name", "undoable"), [*((name, True) for name in ANSWERED), ("isinstance", False), ("child's attribute", False)]
)
def test_a_block_answers_for_the_one_that_it_replaces(name: str, undoable: bool) -> None:
    report = right(talking.model(ANSWERED[name]), undoable=undoable)
    assert report is not None and [step.outcome for step in report.steps] == ["replaced", "replaced"]


UNANSWERED: dict[str, talking.Step] = {
    "type": lambda layer, x: layer.mlp(x) if type(layer.mlp) is Block else 0 * x,
    "weights": lambda layer, x: layer.mlp(x) + layer.mlp.experts[0].d.weight.sum(),
    "hasattr": lambda layer, x: layer.mlp(x) if hasattr(layer.mlp.experts[0].d, "weight") else 0 * x,
    "parameters": lambda layer, x: layer.mlp(x) * len(list(layer.mlp.parameters())),
    "swallowed": lambda layer, x: layer.mlp(x) + swallowed(layer),
    "writes": lambda layer, x: written(layer, x),
}


def swallowed(layer: Layer) -> Any:
    try:
        return layer.mlp.experts[0].d.weight.sum()
    except Exception:
        return 0


def written(layer: Layer, x: Tensor) -> Tensor:
    for p in layer.mlp.parameters():
        p.mul_(2)
    y = layer.mlp(x)
    for p in layer.mlp.parameters():
        p.div_(2)
    return y


@pytest.mark.parametrize(
    ("name", "undoable"), [*((name, True) for name in UNANSWERED), ("type", False), ("weights", False)]
)
def test_what_cant_be_answered_rolls_back_and_names_the_layer(name: str, undoable: bool) -> None:
    model = talking.model(UNANSWERED[name])
    before, modules = outputs(model), list(model.modules())
    with pytest.raises(ProofError, match=r"\b2\b") as caught:
        apply(model, undoable=undoable)
    assert caught.value.report is not None and caught.value.report.done == "rolled back"
    assert torch.equal(outputs(model), before)
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert not any("_apply" in vars(module) or "forward" in vars(module) for module in modules)


CALLED: dict[str, talking.Step] = {
    "beside": lambda layer, x: layer.mlp(x) + layer.mlp.experts[1](x),
    "instead": lambda layer, x: layer.mlp.experts[1](x),
    "deeper": lambda layer, x: layer.mlp(x) + layer.mlp.experts[1].d(layer.mlp.experts[1].g(x)),
}


@pytest.mark.parametrize(("name", "undoable"), [*((name, True) for name in CALLED), ("beside", False)])
def test_a_block_whose_child_the_model_calls_past_it_is_refused_alone(name: str, undoable: bool) -> None:
    model = talking.model(CALLED[name])
    report = right(model, undoable=undoable)
    assert report is not None
    first, second = report.steps
    assert (first.outcome, second.outcome) == ("replaced", "refused")
    assert second.reason.startswith("the model calls its experts.1") and " past it" in second.reason
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_router_that_goes_on_answering_may_be_called_past_the_block() -> None:
    model = talking.model(lambda layer, x: layer.mlp(x) * layer.mlp.gate(x).sigmoid().amax(-1, keepdim=True))
    before = outputs(model)
    assert len(moe_surgery.apply(model, target="vllm").replaced) == 2
    assert float((outputs(model) - before).norm() / before.norm()) < TOLERANCE


def test_without_the_check_a_weight_that_is_asked_for_is_one_clear_sentence() -> None:
    model = talking.model(UNANSWERED["weights"])
    report = apply(model, model_check=False)
    assert report.model_check is None
    with pytest.raises(SurgeryError, match=r"2\.mlp\.experts\.0\.d\.weight can't be used: .* undo first"):
        outputs(model)


class Reads(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) + 0 * self.mlp.experts[0].d.weight.sum()


class ReadsInCall(Layer):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 0 * self.mlp.experts[0].d.weight.sum()


class Exactly(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) if type(self.mlp) is Block else x


class Registry(Layer):
    blocks: list[nn.Module] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks[-1](x)


def holding(keep: Callable[[Any, Any], None]) -> Callable[[], nn.Module]:
    return lambda: talking.model(keep=keep)


def instead(cls: type[Layer]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = talking.model()
        model[2] = cls(model[2].mlp, talking.plain).eval()
        if cls is Registry:
            Registry.blocks[:] = [model[2].mlp]
        return model

    return make


def hooked(kind: str, make: Callable[[Any], Callable[..., Any]]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = talking.model()
        getattr(model[2], f"register_{kind}")(make(model[2]))
        return model

    return build


def rewrite(module: Any, *_: Any) -> None:
    for p in module.mlp.parameters():
        p.data.mul_(1)


def expert_of(layer: Any) -> Callable[..., None]:
    expert = layer.mlp.experts[3]
    return lambda *_: expert.d.weight.data.add_(0)


class Holder:
    def __init__(self, held: nn.Module) -> None:
        self.held = held

    def hook(self, *_: Any) -> None: ...


HELD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "list": (holding(lambda layer, block: setattr(layer, "kept", [block.experts])), "2 (in kept) holds 2.mlp.experts"),
    "dict": (holding(lambda layer, block: setattr(layer, "kept", {"x": (block,)})), "2 (in kept) holds 2.mlp,"),
    "closure": (holding(lambda layer, block: setattr(layer, "kept", lambda: block.gate)), "(in kept) holds 2.mlp"),
    "partial": (
        holding(lambda layer, block: setattr(layer, "kept", functools.partial(torch.sum, block.gate.weight))),
        "(in kept) holds 2.mlp.gate.weight",
    ),
    "weakref": (holding(lambda layer, block: setattr(layer, "kept", weakref.ref(block.gate))), "holds 2.mlp.gate"),
    "method": (holding(lambda layer, block: setattr(layer, "kept", block.forward)), "(in kept) holds 2.mlp"),
    "view": (holding(lambda layer, block: setattr(layer, "kept", (block.gate.weight.data[1:],))), "2.mlp.gate.weight"),
    "module": (holding(lambda layer, block: setattr(layer, "kept", nn.ModuleDict({"a": block.experts}))), "holds"),
    "tied": (holding(lambda layer, block: setattr(layer, "kept", block.gate.weight)), "(as kept) holds"),
    "class": (instead(Registry), "Registry.blocks holds 2.mlp"),
    "forward": (instead(Reads), "the forward of 2 uses"),
    "__call__": (instead(ReadsInCall), "the forward of 2 uses"),
    "exact type": (instead(Exactly), "whether its class is exactly Block"),
    "hook": (hooked("forward_hook", expert_of), "a forward hook of 2 holds 2.mlp.experts.3"),
    "hook's object": (hooked("forward_hook", lambda layer: Holder(layer.mlp.gate).hook), "a forward hook of 2 holds"),
    "hook by name": (hooked("forward_pre_hook", lambda _: rewrite), "may reach into it (it names parameters)"),
}


@pytest.mark.parametrize("name", HELD)
def test_who_else_holds_a_block_is_found_before_anything_is_built(name: str) -> None:
    make, reason = HELD[name]
    report = right(make(), model_check=False)
    assert report is not None
    first, second = report.steps
    assert second.outcome == "refused" and reason in second.reason, second.reason
    assert first.outcome == "replaced"


@pytest.mark.parametrize("listened", [False, True])
def test_blocks_may_share_a_module_that_holds_nothing(listened: bool) -> None:
    model, shared = talking.model(lambda layer, x: layer.mlp(x)), nn.SiLU().eval()
    model.aside = shared
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for expert in block.experts:
            expert.act = shared
    if listened:
        model.aside.register_forward_hook(lambda *_: None)
    report = right(model)
    assert report is not None
    assert {step.outcome for step in report.steps} == {"missed" if listened else "replaced"}, report.steps


@pytest.mark.parametrize(
    "hook",
    [lambda *_: None, lambda _, args, output=None: (args[0] * 1.0,) if output is None else output + 0.0],
    ids=["nothing", "changes the input or output"],
)
@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_harmless_hooks_around_a_block_stay(kind: str, hook: Callable[..., Any]) -> None:
    report = right(hooked(kind, lambda _: hook)())
    assert report is not None and len(report.replaced) == 2


def test_accelerate_may_move_inputs_but_not_weights() -> None:
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = talking.model()
    add_hook_to_module(model[2], AlignDevicesHook("cpu", io_same_device=True))
    report = right(model)
    assert report is not None and len(report.replaced) == 2
    moving, _ = cpu_offload_with_hook(talking.model(), "cpu")
    report = right(moving)
    assert report is not None and all("CpuOffload" in step.reason for step in report.refused)
    assert len(report.refused) == 2


def test_adapters_on_expert_parameters_are_refused() -> None:
    from peft import LoraConfig, get_peft_model
    from test_apply import tiny

    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny(2), config).eval()
    report = apply(model)
    assert len(report.refused) == 2 and all("down_proj" in step.reason for step in report.refused)


def test_a_value_that_the_block_computed_with_cant_be_changed_any_more() -> None:
    model = talking.model()
    apply(model)
    block: Any = model[1].mlp
    block.num_experts = talking.EXPERTS  # as it was
    with pytest.raises(SurgeryError, match=r"1\.mlp\.num_experts can't be changed"):
        block.num_experts = 3
    with pytest.raises(SurgeryError, match=r"1\.mlp\.experts can't be used"):
        block.experts = nn.ModuleList()
    block.note = "of somebody else"


def test_the_router_that_is_kept_for_its_hooks_cant_be_changed() -> None:
    from test_apply import IDS as ids
    from test_apply import tiny

    model = tiny(2)
    router: Any = model.model.layers[1].mlp.gate
    seen: list[Tensor] = []
    report = moe_surgery.apply(model, model_check=False)
    kept: Any = model.model.layers[1].mlp.gate
    handle = kept.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    assert isinstance(kept, type(router)) and kept.top_k == router.top_k
    for change in (
        lambda: setattr(kept, "top_k", 1),
        lambda: kept.weight.mul_(2),
        lambda: setattr(kept, "weight", None),
    ):
        with pytest.raises(SurgeryError, match=r"layers\.1\.mlp\.gate\.(top_k|weight) can't be"):
            change()
    with torch.no_grad():
        model(ids)
        assert len(seen) == 1
        handle.remove()
        model(ids)
    assert len(seen) == 1
    assert torch.equal(kept.state_dict()["weight"], router.weight)
    moe_surgery.undo(report)
    assert model.model.layers[1].mlp.gate is router


# Models that look at their blocks, in any combination.
STEPS = {
    **{f"answered: {k}": v for k, v in ANSWERED.items()},
    **{f"called: {k}": v for k, v in CALLED.items()},
    **{f"unanswered: {k}": v for k, v in UNANSWERED.items()},
}


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_models_that_look_at_their_blocks_are_never_silently_wrong(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=3))
    weights = [data.draw(st.sampled_from([0.5, 1.0, -1.0])) for _ in names]

    def step(layer: Layer, x: Tensor) -> Tensor:
        parts = (weight * STEPS[name](layer, x) for name, weight in zip(names, weights, strict=True))
        return sum(parts, start=torch.zeros_like(x)) / len(names)

    keep = data.draw(st.sampled_from([None, lambda layer, block: setattr(layer, "kept", [block.gate])]))
    model = talking.model(step, keep, seed=data.draw(st.integers(0, 9)))
    right(model, undoable=data.draw(st.booleans()))
