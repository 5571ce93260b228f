"""The tiny models of every family: they build, run, and every part of their MoE blocks shows in what they compute."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from moe_surgery.errors import UsageError
from moe_surgery.testing import filling
from moe_surgery.testing.families import build, families, outputs

CASES = [(name, setting) for name, family in families().items() for setting in ("default", *family.settings)]

# Settings that transformers' own block ignores, or that differ only below float32.
WITHOUT_EFFECT = {("deepseek_v2", "raw"), ("hy_v3", "same-dtype")}

# Experts that a few tokens needn't reach: one a token in Switch; in NLLB-MoE, as written in transformers 5.19, never
# any but the first two.
UNREACHED = {"nllb_moe": r"expert_[2-7]\.", "switch_transformers": r"expert_\d\."}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost models of this size more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def plain_outputs(name: str) -> torch.Tensor:
    return outputs(*build(name))


def test_every_family_of_transformers_that_routes_tokens_to_experts_is_there() -> None:
    models = Path(transformers.models.__file__).parent
    sparse = set()
    for module in pkgutil.iter_modules([str(models)]):
        source = models / module.name / f"modeling_{module.name}.py"
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        if re.search(r"class \w*(Experts|SparseMLP|MoE|MoeMLP|ParallelExperts)\(", text):
            sparse.add(module.name)
    assert {family.folder for family in families().values()} == sparse
    assert len(sparse) == 64


@pytest.mark.parametrize("name, setting", CASES)
def test_builds_and_runs(name: str, setting: str) -> None:
    model, inputs = build(name, setting)
    result = outputs(model, inputs)
    assert result.isfinite().all() and result.dtype == torch.float32 and not model.training
    if setting != "default":
        plain = plain_outputs(name)
        same = plain.shape == result.shape and (plain - result).norm() < 1e-3 * plain.norm()
        assert same == ((name, setting) in WITHOUT_EFFECT)


@pytest.mark.parametrize("name", families())
def test_every_tensor_of_the_moe_parts_shows_in_the_outputs(name: str) -> None:
    model, inputs = build(name)
    before = outputs(model, inputs)
    unseen = []
    for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places, kept = filling.PLACES.search(tensor_name), filling.KEPT.search(tensor_name)
        unreached = re.search(UNREACHED.get(name, "$^"), tensor_name)
        if not places or kept or unreached or not tensor.is_floating_point():
            continue
        held = tensor.clone()
        # Half of a matrix's values, so that no scale which a later norm takes out can hide the change.
        tensor.flatten()[::2] *= -1
        if (outputs(model, inputs) - before).norm() < 1e-4 * before.norm():
            unseen.append(tensor_name)
        tensor.copy_(held)
    assert unseen == []


def test_the_same_arguments_give_the_same_model_and_other_seeds_another() -> None:
    one, other = outputs(*build("qwen2_moe")), outputs(*build("qwen2_moe"))
    assert torch.equal(one, other)
    assert not torch.equal(one, outputs(*build("qwen2_moe", seed=1)))


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build("qwen2_moe")
    assert torch.equal(torch.rand(3), expected)


def test_unknown_names_are_errors_that_list_the_known() -> None:
    with pytest.raises(UsageError, match="no family is called 'qwen9'; there are afmoe, "):
        build("qwen9")
    with pytest.raises(UsageError, match="qwen2_moe has no setting 'gleu'; it has default, top1"):
        build("qwen2_moe", "gleu")
