"""What users call on a model with swapped blocks in it: it works, or is refused before it has begun."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import save_file
from test_apply import IDS, picture, tiny
from torch import nn

import moe_surgery
from moe_surgery.errors import GradientError, SurgeryError, UsageError

TARGETS = ("reference", "auto")
CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="meta"),
    "a part of it": lambda model: model.model.layers.half(),
}


@pytest.fixture(params=TARGETS)
def operated(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model = tiny(2)
    return model, moe_surgery.apply(model, target=request.param, model_check=False)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_is_refused_before_anything_is_converted(name: str, operated: tuple[Any, Any]) -> None:
    model, report = operated
    before = picture(model)
    with pytest.raises(SurgeryError, match="can't go from torch.float32 on cpu to"):
        CONVERSIONS[name](model)
    assert picture(model) == before
    moe_surgery.undo(report)
    assert not any("_apply" in vars(module) or module._load_state_dict_pre_hooks for module in model.modules())
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())]
)
def test_a_copy_is_refused_with_the_reason(copied: Callable[[Any], Any], operated: tuple[Any, Any]) -> None:
    model, report = operated
    for whole in (model, model.model.layers):
        with pytest.raises(SurgeryError, match="can't be copied or pickled; undo first"):
            copied(whole)
    moe_surgery.undo(report)
    copied(model)


def test_weights_are_not_exchanged_for_none(operated: tuple[Any, Any]) -> None:
    """``to_empty`` changes neither dtype nor device, and leaves whatever the memory holds."""
    model, _ = operated
    before = picture(model)
    for _ in range(3):
        with pytest.raises(SurgeryError, match="can't be given other weights, or none: undo first"):
            model.to_empty(device="cpu")
    assert picture(model) == before


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "an old weight": lambda model, old: old.experts.down_proj.mul_(2),
    "a new weight": lambda model, old: model.model.layers[1].mlp.fused_router.mul_(2),
    "a step": lambda model, old: torch.optim.SGD([_graded(old.gate.weight)], lr=0.1).step(),
}


def _graded(weight: torch.Tensor) -> torch.Tensor:
    weight.grad = torch.ones_like(weight)
    return weight


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_are_changed_in_place_are_an_error_and_never_half_seen(name: str, target: str) -> None:
    model = tiny(2)
    old = model.model.layers[1].mlp
    report = moe_surgery.apply(model, target=target, model_check=False)
    with torch.no_grad():
        model(IDS)
        CHANGES[name](model, old)
        for _ in range(2):
            with pytest.raises(SurgeryError, match=r"^model\.layers\.1\.mlp\.\S+ .*changed in place since"):
                model(IDS)
        moe_surgery.undo(report)
        wanted = model(IDS).logits
        moe_surgery.apply(model, target=target)
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-4)


def test_a_call_in_training_mode_is_refused(operated: tuple[Any, Any]) -> None:
    model, _ = operated
    with torch.no_grad(), pytest.raises(GradientError, match="for inference"):
        model.train()(IDS)
    model.eval()


def test_what_converts_nothing_passes(operated: tuple[Any, Any]) -> None:
    model, _ = operated
    assert model.to("cpu") is model and model.float() is model and model.eval() is model
    assert model.requires_grad_(False) is model


def test_a_model_saves_what_it_was_loaded_from(operated: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = operated
    wanted = tiny(2).state_dict()
    found = model.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, tiny(2)(IDS).logits)


def test_without_originals_nothing_is_overwritten(tmp_path: Path) -> None:
    model = tiny(2)
    moe_surgery.apply(model, undoable=False, model_check=False)
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(SurgeryError, match="nothing was written"):
        model.save_pretrained(tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
    state, wanted = model.state_dict(), tiny(2).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        name: (t.shape, t.dtype) for name, t in wanted.items()
    }
    assert torch.equal(state["lm_head.weight"], wanted["lm_head.weight"])
    experts: Any = state["model.layers.0.mlp.experts.down_proj"]
    for use in (torch.clone, lambda t: t + 1, lambda t: torch.save(t, tmp_path / "x"), lambda t: t.tolist()):
        with pytest.raises(SurgeryError, match=r"layers\.0\.mlp\.experts\.down_proj can't be saved or read"):
            use(experts)
    with pytest.raises(SurgeryError, match="can't be saved or read"):
        save_file(state, tmp_path / "y")


def test_loading_is_refused_before_anything_is_loaded(operated: tuple[Any, Any]) -> None:
    model, _ = operated
    before = picture(model)
    with pytest.raises(SurgeryError, match=r"model\.layers\.0\.mlp\.\S+ can't be loaded"):
        model.load_state_dict({name: tensor + 1 for name, tensor in tiny(2).state_dict().items()})
    assert picture(model) == before
    wanted = model.lm_head.weight + 1
    keys = model.load_state_dict({"lm_head.weight": wanted}, strict=False)
    assert not keys.unexpected_keys and {*keys.missing_keys, "lm_head.weight"} == {*tiny(2).state_dict()}
    assert torch.equal(model.lm_head.weight, wanted)


@pytest.mark.parametrize("undoable", [True, False])
def test_adapters_elsewhere_are_saved_and_loaded(undoable: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny(2), config).eval()
    moe_surgery.apply(adapted, undoable=undoable, model_check=False)
    adapted.save_pretrained(tmp_path)
    model = tiny(2)
    moe_surgery.apply(model, undoable=undoable, model_check=False)
    again = PeftModel.from_pretrained(model, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, adapted(IDS).logits)


def test_a_hook_that_would_never_be_called_is_refused(operated: tuple[Any, Any]) -> None:
    experts = operated[0].model.layers[0].mlp.experts
    for register in (experts.register_forward_hook, experts.register_forward_pre_hook):
        with pytest.raises(SurgeryError, match=r"a hook on model.layers.0.mlp.experts would never be called"):
            register(lambda *called: None)


def test_functions_are_applied_to_blocks_but_not_inside(operated: tuple[Any, Any]) -> None:
    model, _ = operated
    met: list[nn.Module] = []
    assert model.apply(met.append) is model
    blocks = [layer.mlp for layer in model.model.layers]
    assert all(block in met for block in blocks)
    assert not any(inner in met for block in blocks for inner in block.children())


def test_offloaded_weights_are_called_so() -> None:
    model = accelerate.cpu_offload(tiny(1), execution_device="cpu")
    with pytest.raises(UsageError, match="accelerate offloads"):
        moe_surgery.apply(model)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloading_afterwards_is_refused_and_undo_still_works(
    offload: Callable[..., Any], operated: tuple[Any, Any], tmp_path: Path
) -> None:
    model, report = operated
    with torch.no_grad():
        wanted = tiny(2)(IDS).logits
    more = [tmp_path] if offload is accelerate.disk_offload else []
    with pytest.raises(SurgeryError, match=r"layers\.0\.mlp: accelerate's AlignDevicesHook would move the weights"):
        offload(model, *more, execution_device=torch.device("cpu"))
    with torch.no_grad(), pytest.raises(SurgeryError, match="on meta"):  # where its weights are left
        model.model.layers[0].mlp(torch.randn(1, 2, 32))
    moe_surgery.undo(report)
    accelerate.hooks.remove_hook_from_submodules(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, wanted)


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> Any:
        return self.model(ids, use_cache=False).logits


def test_a_trace_that_would_hold_for_one_input_is_refused(operated: tuple[Any, Any]) -> None:
    model, report = operated
    with torch.no_grad(), pytest.raises(SurgeryError, match=r"can't be traced by torch\.jit"):
        torch.jit.trace(Logits(model).eval(), (IDS,))
    moe_surgery.undo(report)
    with torch.no_grad():
        torch.jit.trace(Logits(model).eval(), (IDS,))


def test_a_block_that_cant_be_scripted_says_so(operated: tuple[Any, Any]) -> None:
    with pytest.raises(SurgeryError, match=r"torch\.jit\.script; undo first"):
        torch.jit.script(nn.Sequential(operated[0].model.layers[0].mlp))


def test_an_exported_model_computes_the_same() -> None:
    model = tiny(2)
    moe_surgery.apply(model, model_check=False)
    with torch.no_grad():
        exported = torch.export.export(Logits(model).eval(), (IDS,))
        assert torch.equal(exported.module()(IDS.flip(1)), model(IDS.flip(1)).logits)


def test_inputs_may_still_be_moved_afterwards(operated: tuple[Any, Any]) -> None:
    model, _ = operated
    with torch.no_grad():
        before = model(IDS).logits
        accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True, main_device="cpu")
        assert torch.equal(model(IDS).logits, before)


def test_the_guards_of_somebody_else_come_back() -> None:
    model = tiny(2)
    calls: list[nn.Module] = []

    def convert(fn: Any, recurse: bool = True) -> nn.Module:
        calls.append(model)
        return nn.Module._apply(model, fn, recurse)

    model._apply = convert
    report = moe_surgery.apply(model, model_check=False)
    model.to("cpu")
    with pytest.raises(SurgeryError):
        model.half()
    moe_surgery.undo(report)
    assert vars(model)["_apply"] is convert and len(calls) == 1
