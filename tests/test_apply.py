"""Operating on live models: all or nothing, proven, undoable. Most use the reference target, which builds quickly."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import signal
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode
from torch.utils.hooks import RemovableHandle
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import moe_surgery
from moe_surgery import verbs
from moe_surgery.errors import ExpectationError, PlanError, ProofError, SurgeryError, UsageError
from moe_surgery.interrupts import without_interrupts
from moe_surgery.planning.plan import Plan
from moe_surgery.read.record.recorder import Recorder
from moe_surgery.targets.base import SwappedBlock
from moe_surgery.targets.reference_target import ReferenceTarget

IDS = torch.arange(1, 12)[None]


def tiny(layers: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
    }  # fmt: skip
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**sizes, **changes})).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "mlp" in name:  # the default scale makes experts negligible
            nn.init.normal_(parameter, std=0.3)
    return model


def picture(model: nn.Module) -> list[Any]:
    """Everything that "as it was" means: every module's identity and mode, every tensor's address and bytes."""
    modules = [(path, id(module), module.training) for path, module in model.named_modules()]
    tensors = [
        (name, t.data_ptr(), hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ]
    return [modules, tensors]


class Sabotaged(ReferenceTarget):
    """The reference target, except for what it does at the block of ``path``."""

    def __init__(self, path: str, act: Any) -> None:
        self.path, self.act = path, act

    def build(self, spec: Any, tensors: Any, *, prefix: str) -> SwappedBlock:
        if prefix == self.path:
            result = self.act()
            if isinstance(result, str):
                tensors = replace(tensors, **{result: getattr(tensors, result).flip(0)})
        return super().build(spec, tensors, prefix=prefix)


def sabotage(monkeypatch: pytest.MonkeyPatch, act: Any, path: str = "model.layers.1.mlp") -> None:
    monkeypatch.setattr(verbs, "get_target", lambda name: Sabotaged(path, act))


def test_apply_replaces_every_block_and_changes_no_logit() -> None:
    model = tiny()
    with torch.no_grad():
        before = model(IDS).logits
    report = moe_surgery.apply(model, target="reference")
    with torch.no_grad():
        after = model(IDS).logits
    assert [step.path for step in report.replaced] == [f"model.layers.{n}.mlp" for n in range(3)]
    assert all(step.verdict and step.verdict.passed for step in report.replaced)
    assert all(isinstance(layer.mlp, SwappedBlock) for layer in model.model.layers)
    assert (after - before).norm() <= 1e-4 * before.norm()  # the bound promised for float32


def test_undo_restores_every_module_and_storage() -> None:
    model = tiny()
    before = picture(model)
    report = moe_surgery.apply(model, target="reference")
    assert picture(model) != before
    moe_surgery.undo(report)
    assert picture(model) == before
    with pytest.raises(SurgeryError, match="nothing to undo"):
        moe_surgery.undo(report)


def test_undo_refuses_when_somebody_else_replaced_a_block() -> None:
    model = tiny()
    report = moe_surgery.apply(model, target="reference")
    model.model.layers[2].mlp = nn.Identity()
    with pytest.raises(SurgeryError, match=r"layers\.2\.mlp no longer holds"):
        moe_surgery.undo(report)


def test_a_failed_proof_rolls_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before = picture(model)
    sabotage(monkeypatch, lambda: "w2")
    with pytest.raises(ProofError, match=r"model\.layers\.1\.mlp: ") as caught:
        moe_surgery.apply(model, target="reference")
    assert picture(model) == before
    report = caught.value.report
    assert report is not None and report.done == "rolled back" and report.exit_code == 12
    assert [step.path for step in report.refused] == ["model.layers.1.mlp"]
    assert not report.replaced


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("undoable", [True, False])
def test_an_exception_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, undoable: bool
) -> None:
    model = tiny()
    before = picture(model)

    def fail() -> None:
        raise error

    sabotage(monkeypatch, fail)
    with pytest.raises(type(error)):
        moe_surgery.apply(model, target="reference", undoable=undoable)
    assert picture(model) == before


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even in a test run that was started in the background, where it is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = tiny()
    before = picture(model)

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        moe_surgery.apply(model, target="reference", on_progress=interrupt)
    assert picture(model) == before


def test_an_interrupt_while_blocks_are_exchanged_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_surgery.operate.transaction import Swap

    model = tiny()
    before = picture(model)
    placed: list[str] = []
    place = Swap.place

    def interrupted(swap: Swap, module: nn.Module) -> None:
        place(swap, module)
        placed.append(swap.path)
        if len(placed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Swap, "place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moe_surgery.apply(model, target="reference")
    assert picture(model) == before


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_record_ends_leaves_no_recorder_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Recorder.__exit__

    def interrupted(recorder: Recorder, *error: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        leave(recorder, *error)

    monkeypatch.setattr(Recorder, "__exit__", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            moe_surgery.plan(tiny(1), target="reference")
        assert _get_current_dispatch_mode() is None
    finally:
        while _get_current_dispatch_mode() is not None:
            _pop_mode()


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_ends_what_holds_one_back() -> None:
    went_on = 0

    def interrupted() -> None:
        nonlocal went_on
        with without_interrupts(once=True):
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
                went_on += 1

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert went_on == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("once", [True, False])
def test_each_signal_that_was_held_back_is_delivered_once(once: bool) -> None:
    """One whose handler raises an error keeps none of the others back, nor does a handler that takes itself away."""
    told: list[int] = []

    def ends(number: int, frame: Any) -> None:
        told.append(number)
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    def interrupted() -> None:
        with without_interrupts(once=once):
            for number in (signal.SIGINT, signal.SIGTERM) if once else (signal.SIGTERM, signal.SIGINT):
                assert not told
                signal.raise_signal(number)

    async def waits() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.append, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        await asyncio.sleep(0.01)
        assert told == [signal.SIGINT, signal.SIGTERM]  # which the loop is told of later

    handler = signal.signal(signal.SIGINT, ends)
    try:
        asyncio.run(waits())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("undoable", [True, False])
def test_an_interrupt_after_the_exchange_leaves_nobody_without_a_report(
    undoable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be put back is; what was given up can't be, and all of it is in place."""
    model = tiny()
    before = picture(model)

    def interrupted(**sizes: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_surgery.operate.apply.Memory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moe_surgery.apply(model, target="reference", undoable=undoable)
    if undoable:
        assert picture(model) == before
    else:
        assert all(step.reason == "already fused" for step in moe_surgery.scan(model).kept)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_hooks_are_taken_away_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before, removed, remove = picture(model), [], RemovableHandle.remove

    def interrupted(hook: RemovableHandle) -> None:
        if not removed:
            signal.raise_signal(signal.SIGINT)
        removed.append(hook)
        remove(hook)

    monkeypatch.setattr(RemovableHandle, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moe_surgery.apply(model, target="reference")
    assert removed and picture(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_without_undo_the_originals_are_freed() -> None:
    model = tiny()
    old = weakref.ref(model.model.layers[0].mlp)
    report = moe_surgery.apply(model, target="reference", undoable=False)
    gc.collect()
    assert old() is None
    assert report.memory.kept == 0
    with pytest.raises(SurgeryError, match="given up"):
        moe_surgery.undo(report)


def test_verify_leaves_the_model_as_it_was() -> None:
    model = tiny()
    before = picture(model)
    report = moe_surgery.verify(model, target="reference")
    assert picture(model) == before
    assert report.done == "verified" and report.exit_code == 0
    assert len(report.replaced) == 3


def test_verify_reports_a_failed_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, lambda: "w13")
    report = moe_surgery.verify(tiny(), target="reference")
    assert report.exit_code == 12
    assert [step.path for step in report.refused] == ["model.layers.1.mlp"]


def test_a_second_run_keeps_what_the_first_put_there() -> None:
    model = tiny()
    moe_surgery.apply(model, target="reference")
    report = moe_surgery.apply(model, target="reference")
    assert [step.reason for step in report.kept] == ["already fused"] * 3
    assert not report.replaced


def test_a_second_run_counts_what_the_first_put_there(tmp_path: Any) -> None:
    pack = tmp_path / "pack.toml"
    pack.write_text('[pack]\nname = "p"\nversion = "1"\n[[rule]]\nname = "r"\nfind.path = "**"\nexpect.count = 3\n')
    model = tiny()
    moe_surgery.apply(model, target="reference", packs=[pack], only=["**.1.mlp"])
    report = moe_surgery.apply(model, target="reference", packs=[pack])
    assert (len(report.replaced), len(report.kept)) == (2, 1)


def test_only_skip_and_expect() -> None:
    model = tiny()
    made = moe_surgery.plan(model, target="reference", skip=["**.1.mlp"], expect=2)
    assert [step.outcome for step in made.steps] == ["replaced", "kept", "replaced"]
    assert made.steps[1].reason == "skipped by **.1.mlp"
    made = moe_surgery.plan(model, target="reference", only=["**.1.mlp"])
    assert [step.outcome for step in made.steps] == ["kept", "replaced", "kept"]
    with pytest.raises(ExpectationError, match="expected 2 sites to replace, found 3"):
        moe_surgery.plan(model, target="reference", expect=2)
    with pytest.raises(ExpectationError, match="no MoE-looking site fits"):
        moe_surgery.plan(model, target="reference", skip=["**.mpl"])


def test_strict_names_the_first_miss() -> None:
    model = tiny()
    model.model.layers[1].mlp.experts.act_fn = nn.Softshrink()
    made = moe_surgery.plan(model, target="reference")
    assert made.steps[1].outcome == "missed" and "softshrink" in made.steps[1].reason
    with pytest.raises(ExpectationError, match=r"strict: 1 .*model\.layers\.1\.mlp: .*softshrink"):
        moe_surgery.plan(model, target="reference", strict=True)


def test_a_model_without_parameters_has_nothing_to_replace() -> None:
    for verb in (moe_surgery.apply, moe_surgery.verify):
        assert verb(nn.Sequential(nn.ReLU()).eval()).steps == ()


def test_a_model_in_training_mode_is_refused() -> None:
    report = moe_surgery.apply(tiny().train(), target="reference")
    assert len(report.refused) == 3 and "training mode" in report.refused[0].reason


def test_threads_that_operate_on_one_model_do_so_in_turn() -> None:
    model = tiny(3)
    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(moe_surgery.apply, model, target="reference") for _ in range(3)]
        reports = [task.result() for task in tasks]
    assert sorted(len(report.replaced) for report in reports) == [0, 0, 3]
    assert sorted(len(report.kept) for report in reports) == [0, 3, 3]


def test_a_router_that_is_not_finite_is_refused_and_the_others_are_replaced() -> None:
    model = tiny(3)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2, 3] = torch.inf
    report = moe_surgery.apply(model, target="reference", model_check=False)
    [refused] = report.refused
    assert refused.path == "model.layers.1.mlp" and "the weights in router are not all finite" in refused.reason
    assert len(report.replaced) == 2


def test_a_model_whose_weights_lie_flat_in_shards_is_no_model_without_sites(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(tiny(1), device_id=torch.device("cpu")).eval()
        for verb in (moe_surgery.scan, moe_surgery.plan, moe_surgery.apply, moe_surgery.verify):
            with pytest.raises(UsageError, match="FullyShardedDataParallel holds the model's weights"):
                verb(model)
    finally:
        dist.destroy_process_group()


def test_one_block_at_two_places_is_missed() -> None:
    model = tiny()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    report = moe_surgery.apply(model, target="reference")
    assert [step.path for step in report.replaced] == ["model.layers.1.mlp"]
    assert "several places" in report.missed[0].reason


def test_a_saved_plan_applies_unchanged(tmp_path: Any) -> None:
    made = moe_surgery.plan(tiny(), target="reference", only=["**.1.mlp"])
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made and loaded.fingerprint == made.fingerprint
    report = moe_surgery.apply(tiny(), loaded)
    assert [step.path for step in report.replaced] == ["model.layers.1.mlp"]
    assert report.fingerprint == made.fingerprint
    with pytest.raises(UsageError, match="a plan is given"):
        moe_surgery.apply(tiny(), loaded, only=["*"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_hidden_layers": 4}, "other sites"), ({"num_experts_per_tok": 2}, "planned as .*top-3.*now .*top-2")],
)
def test_a_plan_for_another_model_is_an_error(changes: dict[str, Any], message: str) -> None:
    made = moe_surgery.plan(tiny(), target="reference")
    model = tiny(**{"layers": changes.pop("num_hidden_layers", 3), **changes})
    before = picture(model)
    with pytest.raises(PlanError, match=message):
        moe_surgery.apply(model, made)
    assert picture(model) == before


def test_a_changed_plan_is_an_error(tmp_path: Any) -> None:
    made = moe_surgery.plan(tiny(), target="reference")
    made.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"top_k": 3', '"top_k": 2', 1))
    with pytest.raises(PlanError, match=r"plan\.json: the plan was changed"):
        Plan.load(tmp_path / "plan.json")


def test_scan_names_what_can_be_read() -> None:
    report = moe_surgery.scan(tiny())
    assert [step.outcome for step in report.steps] == ["kept"] * 3
    assert report.steps[0].spec is not None and report.steps[0].spec.router.top_k == 3


def test_apply_takes_a_live_model_with_weights() -> None:
    with pytest.raises(UsageError, match="takes a loaded model"):
        moe_surgery.apply("some/dir")  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = Qwen2MoeForCausalLM(tiny().config).eval()
    with pytest.raises(UsageError, match="meta"):
        moe_surgery.apply(empty, target="reference")


def test_under_a_mode_that_changes_operations_nothing_is_read() -> None:
    model = tiny(1)
    with FakeTensorMode():
        [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "missed" and step.reason.startswith("FakeTensorMode is active")


def test_what_the_caller_has_as_defaults_is_no_matter() -> None:
    model = tiny()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            report = moe_surgery.apply(model, target="reference")
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(report.replaced) == 3 and report.model_check is not None and report.model_check.parts == ("",)


def test_install_operates_on_what_is_loaded(tmp_path: Any) -> None:
    tiny().save_pretrained(tmp_path)
    made = moe_surgery.plan(tiny(), target="reference")
    with moe_surgery.install(made) as handle:
        model = Qwen2MoeForCausalLM.from_pretrained(tmp_path)
    assert len(handle.reports) == 1 and len(handle.reports[0].replaced) == 3
    assert isinstance(model.model.layers[0].mlp, SwappedBlock)
    plain = Qwen2MoeForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(plain.model.layers[0].mlp, SwappedBlock)


def test_a_rule_may_name_its_target(tmp_path: Any) -> None:
    pack = tmp_path / "pack.toml"
    pack.write_text(
        '[pack]\nname = "p"\nversion = "1"\n[[rule]]\nname = "r"\ntarget = "reference"\nfind.path = "**.mlp"\n'
    )
    report = moe_surgery.apply(tiny(), packs=[pack])
    assert [step.target for step in report.replaced] == ["reference"] * 3
    assert [step.rule for step in report.replaced] == ["p/r"] * 3


def test_router_logits_are_still_recorded_with_the_engine() -> None:
    """transformers records them by hooks on the routers, which swapped blocks keep and call when hooked."""
    model = tiny(2)
    with torch.no_grad():
        model.config.output_router_logits = False
        report = moe_surgery.apply(model)
        recorded = model(IDS, output_router_logits=True).router_logits
        moe_surgery.undo(report)
        wanted = model(IDS, output_router_logits=True).router_logits
    assert [step.target for step in report.replaced] == ["folded", "folded"]
    assert len(recorded) == len(wanted) == 2
    for one, other in zip(recorded, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_two_models_in_one_process_with_the_engine() -> None:
    models = [tiny(2), tiny(2, norm_topk_prob=False)]
    with torch.no_grad():
        before = [model(IDS).logits for model in models]
        reports = [moe_surgery.apply(model) for model in models]
        after = [model(IDS).logits for model in models]
    assert [len(report.replaced) for report in reports] == [2, 2]
    for one, other in zip(before, after, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()
