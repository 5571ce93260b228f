"""Blocks as other people write them: replaced by what answers the same, in the same structure, or left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import others, plain
from zoo.libraries import ALL
from zoo.same import distance, inputs

import moe_surgery
from moe_surgery.answers import structured
from moe_surgery.calling import UnreadCall
from moe_surgery.errors import ProofError, SurgeryError
from moe_surgery.planning import survey
from moe_surgery.targets.base import StandingBlock, SwappedBlock

SHAPES = ((2, 3), (1, 1), (5, 13))


class Layer(nn.Module):
    """A model of one block; ``shaped`` ones take batches, others tokens [T, H]."""

    def __init__(self, block: nn.Module, shaped: bool = True) -> None:
        super().__init__()
        self.mlp, self.shaped = block, shaped

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x if self.shaped else x.reshape(-1, x.shape[-1]))


def answers(model: nn.Module) -> list[Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [model(x.clone()) for x in inputs(shapes=SHAPES)]


def assert_same(one: Any, other: Any, exactly: bool) -> None:
    found: list[list[Any]] = [[], []]
    for answer, held in zip((one, other), found, strict=True):
        structured(answer, lambda value, _, held=held: held.append(value))
    assert type(one) is type(other)
    for before, after in zip(*found, strict=True):
        if not isinstance(before, Tensor):
            assert type(before) is type(after) and (before == after or exactly)
        else:
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
            if exactly or not before.dtype.is_floating_point or not before.any():
                assert torch.equal(before, after)
            else:
                assert distance(after, before) < 64


@pytest.mark.parametrize("case", ALL, ids=str)
def test_what_others_write_is_replaced_or_left_alone_for_a_reason(case: others.Case) -> None:
    block = case.make()
    model = Layer(block, case.shaped).eval()
    before = answers(Layer(case.make(), case.shaped).eval())
    steps = moe_surgery.apply(model, target="reference").steps
    paths = [f"mlp.{case.at}" if case.at else "mlp"]
    assert [step.path for step in steps] == paths
    if case.words:
        assert steps[0].outcome in ("missed", "refused")
        assert any(word in steps[0].reason for word in case.words), steps[0].reason
        assert model.mlp is block
    else:
        assert steps[0].outcome == "replaced", steps[0].reason
        assert isinstance(model.get_submodule(paths[0]), SwappedBlock)
    for one, other in zip(before, answers(model), strict=True):
        assert_same(one, other, exactly=bool(case.words))


@pytest.mark.parametrize("name", ["NoiseTimesTraining", "NoiseOfItsOwnSizeTimesTraining"])
def test_what_is_drawn_for_nothing_goes_on_being_drawn(name: str) -> None:
    old, model = (Layer(next(case for case in ALL if case.name == name).make()).eval() for _ in range(2))
    report = moe_surgery.apply(model, target="reference")
    assert report.steps[0].outcome == "replaced"
    for x in inputs(shapes=SHAPES):
        drawn = []
        for one in (old, model):
            torch.manual_seed(0)
            with torch.no_grad():
                one(x)
            drawn.append(torch.rand(3))
        assert torch.equal(*drawn)


def test_what_is_kept_bears_what_it_bore() -> None:
    old, model = (Layer(next(c for c in ALL if c.name == "ChoicesOnWhatItKeeps").make()).eval() for _ in range(2))
    moe_surgery.apply(model, target="reference")
    assert isinstance(model.mlp, SwappedBlock)
    for x in inputs(shapes=SHAPES):
        with torch.no_grad():
            old(x), model(x)
        assert torch.equal(old.mlp.scores.ids, model.mlp.scores.ids)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 2, 2), ()], ids=str)
def test_what_has_sizes_of_its_input_is_told_for_no_other_dimensions(shape: tuple[int, ...]) -> None:
    old, model = (Layer(next(c for c in ALL if c.name == "ChoicesOnWhatItKeeps").make()).eval() for _ in range(2))
    moe_surgery.apply(model, target="reference")
    x = torch.randn(*shape, 32)
    with torch.no_grad():
        assert old.mlp(x).shape == x.shape
        with pytest.raises(UnreadCall):
            model.mlp(x)


COUNTING = ["CountsByHistogram", "CountsAndForgets", "CountsInPlaces"]


def counting(name: str, dtype: torch.dtype = torch.float32) -> Layer:
    model = Layer(next(case for case in ALL if case.name == name).make()).to(dtype)
    with torch.no_grad():
        for number, buffer in enumerate(model.buffers()):
            buffer.fill_(number + 2)
    return model


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_counted_goes_on_being_counted(name: str, dtype: torch.dtype) -> None:
    model, old = counting(name, dtype), counting(name, dtype)
    held = dict(model.mlp.named_buffers())
    report = moe_surgery.apply(model, target="reference")
    assert isinstance(model.mlp, SwappedBlock), report.steps[0].reason
    for x in inputs(shapes=SHAPES):
        for buffer, counted in old.mlp.named_buffers():  # before the first call: the proof's own calls don't count
            assert getattr(model.mlp, buffer) is held[buffer]
            assert torch.equal(held[buffer], counted), buffer
        with torch.no_grad():
            model(x.to(dtype)), old(x.to(dtype))
    model.mlp.tokens_per_expert = torch.zeros_like(held["tokens_per_expert"])
    model(x.to(dtype))
    assert model.mlp.tokens_per_expert.any() and model.mlp.tokens_per_expert is not held["tokens_per_expert"]
    saved = model.state_dict()
    assert torch.equal(saved["mlp.tokens_per_expert"], model.mlp.tokens_per_expert)
    assert set(saved) == set(old.state_dict())
    counted = model.mlp.tokens_per_expert.clone()
    moe_surgery.undo(report)
    assert torch.equal(model.mlp.tokens_per_expert, counted)


def test_no_gradient_is_left_in_a_buffer() -> None:
    model = counting("MeansOfItsScores").requires_grad_(True)
    report = moe_surgery.apply(model, target="reference")
    assert report.steps[0].outcome == "replaced", report.steps[0].reason
    for buffer in model.buffers():
        assert buffer.is_leaf and not buffer.requires_grad
    moe_surgery.undo(report)
    copy.deepcopy(model)


def test_a_wrong_count_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = counting("CountsByHistogram")
    right = StandingBlock.write_buffer

    def wrong(self: StandingBlock, name: str, value: Tensor) -> None:
        right(self, name, value + (self.get_buffer(name) > 60))

    for update in (wrong, lambda self, name, value: None):
        monkeypatch.setattr(StandingBlock, "write_buffer", update)
        with pytest.raises(ProofError, match="buffer tokens_per_expert"):
            moe_surgery.apply(model, target="reference")
        assert torch.equal(model.mlp.tokens_per_expert, torch.full((8,), 2.0))


@pytest.mark.parametrize("name", ["WithLogitsAndIds", "WithAllOfTheRouter", "Unused"])
def test_kernels_answer_the_same(name: str) -> None:
    case = next(case for case in others.CASES if case.name == name)
    model = Layer(case.make())
    before = answers(model)
    [step] = moe_surgery.apply(model).steps
    assert step.outcome == "replaced", step.reason
    for one, other in zip(before, answers(model), strict=True):
        assert_same(one, other, exactly=False)


def replaced(name: str) -> nn.Module:
    model = Layer(next(case for case in others.CASES if case.name == name).make())
    moe_surgery.apply(model, target="reference")
    assert isinstance(model.mlp, SwappedBlock)
    return model.mlp


def test_arguments_are_never_ignored() -> None:
    x = torch.randn(2, 3, 32)
    block = replaced("Optional")
    assert torch.equal(block(x), block(hidden_states=x, attention_mask=None))
    with pytest.raises(SurgeryError, match="attention_mask"):
        block(x, torch.ones(2, 3, 1))
    with pytest.raises(TypeError, match="no argument 'mask'"):
        block(x, mask=None)
    with pytest.raises(TypeError, match="two values"):
        block(x, hidden_states=x)
    with pytest.raises(TypeError, match="needs its argument 'hidden_states'"):
        block()
    gathering = replaced("Gathering")
    gathering(x, scale=1.0)
    for given, named in (((1,), {}), ((), {"more": 2}), ((), {"scale": 2.0}), ((), {"scale": True})):
        with pytest.raises(SurgeryError, match="was not read with"):
            gathering(x, *given, **named)
    passed_on = replaced("PassedOn")
    assert torch.equal(passed_on(x, torch.arange(6)), passed_on(x))
    unused = replaced("Unused")
    assert torch.equal(unused(x, 3, cache=object()), unused(x))


@pytest.mark.parametrize("name", ["AnotherRouterForImages", "OtherExpertsForImages"])
def test_what_a_block_would_do_with_more_is_never_left_out(name: str) -> None:
    model = Layer(next(case for case in ALL if case.name == name).make()).eval()
    assert moe_surgery.apply(model, target="reference").steps[0].outcome == "replaced"
    with pytest.raises(SurgeryError, match="image_mask"):
        model.mlp(torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.bool))


class Telling(Layer):
    """A model that gives its block what ``told`` makes of the input too."""

    def __init__(self, told: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__(plain.make(plain.block_class(others.NeedsIds, *others.LISTED, name="NeedsIds")))
        self.told = told

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x, self.told(x))


def test_an_argument_that_is_needed_may_be_none_or_what_the_model_gives() -> None:
    x = torch.randn(2, 3, 32)
    model = Telling(lambda x: None).eval()
    before = model(x)
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": x}).steps
    assert step.outcome == "replaced", step.reason
    assert distance(model(x), before) < 64
    with pytest.raises(SurgeryError, match="input_ids"):
        model.mlp(x, torch.ones(2, 3))
    with pytest.raises(TypeError, match="needs its argument 'input_ids'"):
        model.mlp(x)
    model = Telling(lambda x: 1 + (x[..., 0] > 0).long() * 6).eval()
    before = model(x)
    [step] = moe_surgery.apply(model, target="reference", model_check={"x": x}).steps
    assert step.outcome == "replaced" and step.spec.router.own, step.reason  # with the ids that it is given
    assert distance(model(x), before) < 64
    with pytest.raises(SurgeryError, match="input_ids"):
        model.mlp(x, None)


class Masking(Layer):
    def forward(self, x: Tensor) -> Any:
        return self.mlp(x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype))


def test_a_block_that_the_model_calls_with_more_is_refused_and_others_are_replaced() -> None:
    case = next(case for case in others.CASES if case.name == "Optional")
    model = nn.Sequential(Layer(case.make()), Masking(case.make())).eval()
    x = torch.randn(2, 3, 32)
    before = model(x)
    steps = moe_surgery.apply(model, target="reference", model_check={"input": x}).steps
    assert [step.outcome for step in steps] == ["replaced", "refused"]
    assert "a value for attention_mask" in steps[1].reason
    assert distance(model(x), before) < 64


def test_a_block_that_reading_breaks_at_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("of nothing")

    broken, model = survey.read_within.__globals__, Layer(next(c for c in ALL if c.name == "HalfOfAllBeside").make())
    monkeypatch.setitem(broken, "check_site", fails)
    step = moe_surgery.apply(model.eval()).steps[0]
    assert step.outcome == "missed" and "ZeroDivisionError: of nothing" in step.reason


def test_a_wrong_result_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_surgery.targets.convention import Convention

    right = Convention.routed

    def wrong(self: Convention, x: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        values = right(self, x, dtype)
        return values if dtype is not None else {**values, "logits": values["logits"] * 1.001}

    monkeypatch.setattr(Convention, "routed", wrong)
    model = Layer(next(case for case in others.CASES if case.name == "WithLogits").make())
    with pytest.raises(ProofError, match="logits are"):
        moe_surgery.apply(model, target="reference")


def test_what_a_block_writes_is_there_after_it_was_replaced_and_reading_leaves_no_trace() -> None:
    block = next(case for case in others.CASES if case.name == "WritesZero").make()
    moe_surgery.plan(Layer(block))
    assert not hasattr(block, "aux_loss") and not hasattr(block, "calls_counted")
    new = replaced("WritesZero")
    assert torch.equal(new.aux_loss, torch.zeros(())) and new.calls_counted is False


def test_an_object_that_a_block_writes_to_is_kept_up_to_date_and_left_as_it_was() -> None:
    case = next(case for case in ALL if case.name == "WithADispatcher")
    model = Layer(case.make()).eval()
    held = model.mlp.token_dispatcher
    assert moe_surgery.apply(model, target="reference").steps[0].outcome == "replaced" and vars(held) == {}
    model(torch.randn(2, 3, 32))
    assert held.shape == (2, 3, 32) and held.order.shape == (12,)
    assert model.mlp.token_dispatcher is held


def test_what_every_call_writes_to_an_object_is_written_by_calls_alone() -> None:
    model = Layer(next(case for case in ALL if case.name == "WithADispatcherThatIsReadyOnceCalled").make()).eval()
    held = model.mlp.token_dispatcher
    assert moe_surgery.apply(model, target="reference").steps[0].outcome == "replaced" and vars(held) == {}
    model(torch.randn(2, 3, 32))
    assert held.ready and held.tokens == (6, 32) and held.shape == (2, 3, 32) and held.scale == 1


def test_a_dict_of_a_block_is_the_same_and_kept_up_to_date() -> None:
    def made() -> Layer:
        return Layer(next(case for case in ALL if case.name == "KeepsUnderNames").make()).eval()

    model, old = made(), made()
    held = model.mlp.stats
    report = moe_surgery.apply(model, target="reference")
    assert report.steps[0].outcome == "replaced" and held == {}
    for x in inputs(shapes=SHAPES):
        model(x), old(x)
        assert model.mlp.stats is held and list(held) == list(old.mlp.stats)
        for name, value in old.mlp.stats.items():
            assert_same(held[name], value, exactly=False)
    moe_surgery.undo(report)
    assert model.mlp.stats is held


@pytest.mark.parametrize("name", ["KeepsItsLoads", "KeepsItsLoadsOfSeveral"])
def test_numbers_of_tokens_in_python_are_kept(name: str) -> None:
    case = next(case for case in ALL if case.name == name)
    model, old = Layer(case.make()).eval(), Layer(case.make()).eval()
    moe_surgery.apply(model, target="reference")
    assert not hasattr(model.mlp, "loads")
    for x in inputs(shapes=((1, 1), *SHAPES, (1, 1))):
        model(x), old(x)
        assert model.mlp.loads == old.mlp.loads if hasattr(old.mlp, "loads") else not hasattr(model.mlp, "loads")
        for attribute in ("order", "sorted_weights") if hasattr(old.mlp, "loads") else ():
            assert_same(getattr(model.mlp, attribute), getattr(old.mlp, attribute), exactly=False)
    assert all(type(load) is int for load in model.mlp.loads)


def test_sizes_of_the_input_are_kept() -> None:
    case = next(case for case in ALL if case.name == "KeepsItsInputsSizes")
    model, old = Layer(case.make()).eval(), Layer(case.make()).eval()
    moe_surgery.apply(model, target="reference")
    assert (model.mlp.choices, model.mlp.one) == (2, 1) and not hasattr(model.mlp, "tokens")
    for x in [*inputs(shapes=SHAPES), *(x[0] for x in inputs(shapes=SHAPES))]:
        model(x), old(x)
        for name in ("tokens", "rows", "last", "chosen", "choices", "one"):
            assert getattr(model.mlp, name) == getattr(old.mlp, name)
            assert type(getattr(model.mlp, name)) is int


def test_a_dict_that_a_block_makes_is_made_anew_in_every_call() -> None:
    case = next(case for case in ALL if case.name == "KeepsADict")
    model, old = Layer(case.make()).eval(), Layer(case.make()).eval()
    moe_surgery.apply(model, target="reference")
    assert not hasattr(model.mlp, "losses")
    for x in inputs(shapes=SHAPES):
        model(x), old(x)
        assert_same(model.mlp.losses, old.mlp.losses, exactly=False)


@pytest.mark.parametrize("name, said", [("z", "losses is 0.5 from"), ("none", "losses is inf from")])
def test_a_wrong_value_in_a_dict_fails_the_proof(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StandingBlock.write

    def wrong(self: StandingBlock, path: str, attribute: str, value: Any) -> None:
        right(self, path, attribute, {**value, name: 1.5 * value[name] + (name == "none")})

    monkeypatch.setattr(StandingBlock, "write", wrong)
    with pytest.raises(ProofError, match=said):
        moe_surgery.apply(Layer(next(case for case in ALL if case.name == "KeepsADict").make()), target="reference")


def test_an_object_that_the_new_block_does_not_write_to_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_surgery.targets.base import StandingBlock

    monkeypatch.setattr(StandingBlock, "write", lambda *_: None)
    model = Layer(next(case for case in ALL if case.name == "WithADispatcher").make())
    with pytest.raises(ProofError, match="token_dispatcher"):
        moe_surgery.apply(model, target="reference")
    assert vars(model.mlp.token_dispatcher) == {}


def test_a_weight_that_the_first_call_converts_is_a_reason_to_leave_a_block_alone() -> None:
    block = next(case for case in ALL if case.name == "ConvertsItsBias").make().bfloat16()
    [step] = moe_surgery.apply(Layer(block), target="reference").steps
    assert step.outcome == "missed" and "exchanges the data of shift" in step.reason
    assert block.shift.dtype is torch.bfloat16


def test_a_new_tensor_has_the_dtype_of_the_one_that_it_is_asked_of() -> None:
    model = Layer(next(case for case in ALL if case.name == "WithANewTensor").make().bfloat16()).eval()
    assert moe_surgery.apply(model, target="reference").steps[0].outcome == "replaced"
    assert model(torch.randn(2, 3, 32, dtype=torch.bfloat16))[1].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["ConvertsItsRouter", "MakesABufferOnTheWay", "DoublesItsBias", "ExchangesItsBias"])
def test_reading_leaves_weights_that_a_block_replaces_as_they_were(name: str) -> None:
    block = next(case for case in ALL if case.name == name).make()
    held = block.state_dict(keep_vars=True)
    before = [(key, id(weight), weight.dtype, weight.clone()) for key, weight in held.items()]
    moe_surgery.plan(Layer(block))
    after = block.state_dict(keep_vars=True)
    assert [key for key, *_ in before] == list(after)
    for key, which, dtype, values in before:
        assert (id(after[key]), after[key].dtype) == (which, dtype)
        assert torch.equal(after[key], values)
    remembering = next(case for case in others.CASES if case.name == "RemembersItsChoice").make()
    moe_surgery.plan(Layer(remembering))
    assert not hasattr(remembering, "last")


@pytest.mark.parametrize("name", ["OfConvolutionsOverOnePlace", "OfGatedConvolutionsOfImages"])
def test_convolutions_over_one_place_are_replaced_in_half_precision(name: str) -> None:
    model = Layer(next(case for case in ALL if case.name == name).make()).eval().bfloat16()
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    before = model(x)
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "replaced", step.reason
    assert distance(model(x), before) < 4


def test_what_einops_knows_of_tensors_by_now_is_no_state_of_a_block() -> None:
    backends = pytest.importorskip("einops._backends")
    rearrange = pytest.importorskip("einops").rearrange

    class ByEinops(plain.Base):
        def forward(self, hidden_states: Tensor) -> Tensor:
            out = super().forward(rearrange(hidden_states, "b s h -> (b s) h"))
            return rearrange(out, "(b s) h -> b s h", s=hidden_states.shape[1])

    model = Layer(plain.make(plain.block_class(ByEinops, *others.LISTED, name="ByEinops")))
    backends._type2backend.clear()
    backends._loaded_backends.clear()
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "replaced", step.reason


def test_what_computes_in_its_own_dtype_alone_is_replaced_in_that() -> None:
    case = next(case for case in ALL if case.name == "ComputesInBfloat16")
    old, model = case.make().bfloat16(), Layer(case.make().bfloat16()).eval()
    [step] = moe_surgery.apply(model, target="reference").steps
    assert step.outcome == "replaced", step.reason
    with torch.no_grad():
        for x in inputs(dtype=torch.bfloat16, shapes=SHAPES):
            assert distance(model(x), old(x)) < 64
