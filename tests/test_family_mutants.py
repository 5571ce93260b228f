"""Mutants of real families: whatever their modules are made to compute, ``apply`` changes nothing of it in silence.

Every module of a family's first sparse-MoE block is altered, by a wrapper around its forward or by one of its plain
attributes. Each mutant is then operated on: it must compute what it did, replaced or left alone, or the operation must
fail loudly and leave it as it was.

Blocks that have the structure of one that was read before, such as a family's second, aren't read anew for each mutant;
where the altered block has the structure of the unaltered one, all are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

import moe_surgery
from moe_surgery.errors import SurgeryError
from moe_surgery.models.tree import find_sites
from moe_surgery.planning import survey
from moe_surgery.read.sameness import Readings, structure
from moe_surgery.testing.families import build, families, outputs
from moe_surgery.testing.trial import TOLERANCE
from moe_surgery.testing.trial import distance as moved

Change = Callable[[nn.Module], None]
FEWEST = 8
"""Mutants that every family has."""


def on_output(change: Callable[[Tensor], Tensor], place: int = 0) -> Change:
    """Alter what a module returns: the tensor, or the floating ones of a tuple from ``place`` on."""

    def alter(module: nn.Module) -> None:
        forward = module.forward

        def altered(*args: Any, **kwargs: Any) -> Any:
            y = forward(*args, **kwargs)
            if isinstance(y, Tensor):
                return change(y)
            return tuple(
                change(part) if at >= place and isinstance(part, Tensor) and part.is_floating_point() else part
                for at, part in enumerate(y)
            )

        module.forward = altered  # type: ignore[method-assign]

    return alter


def on_input(change: Callable[[Tensor], Tensor]) -> Change:
    def alter(module: nn.Module) -> None:
        forward = module.forward
        module.forward = lambda x, *args, **kwargs: forward(change(x), *args, **kwargs)  # type: ignore[method-assign]

    return alter


WRAPPED: dict[str, Change] = {
    "outputs scaled": on_output(lambda y: 1.25 * y),
    "outputs squashed": on_output(torch.tanh),
    "outputs clamped": on_output(lambda y: y.clamp(-0.02, 0.02)),
    "outputs normalised": on_output(lambda y: y / (1 + y.pow(2).mean(-1, keepdim=True)).sqrt()),
    "outputs reversed": on_output(lambda y: y.flip(-1)),
    "inputs scaled": on_input(lambda x: 0.5 * x),
    "inputs shifted": on_input(lambda x: x + 0.125),
}


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Plain attributes of a module with another value for each."""
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, bool):
            yield name, not value
        elif type(value) is float and value:
            yield name, 0.375 * value
        elif type(value) is int and ("top_k" in name or name in ("num_group", "topk_group")) and value > 1:
            yield name, value - 1


def mutations(block: nn.Module) -> list[tuple[str, str, Change]]:
    """``(module's path in the block, what is altered, how)``."""
    found: list[tuple[str, str, Change]] = []
    children = [path for path, child in block.named_children() if any(True for _ in child.parameters())]
    for number, path in enumerate(("", *children)):
        for at, (what, change) in enumerate(WRAPPED.items()):
            if (at + number) % 3 == 0:  # a third for each module, all of them over the modules
                found.append((path, what, change))
    for path, module in block.named_modules():
        for attribute, value in attributes(module):

            def change(module: nn.Module, attribute: str = attribute, value: Any = value) -> None:
                setattr(module, attribute, value)

            found.append((path, f"{attribute} {value}", change))
    return found


def copied(model: nn.Module) -> nn.Module:
    """A copy whose modules hold the same configs, so that only what is altered has another structure."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return copy.deepcopy(model, {id(value): value for value in values if isinstance(value, PreTrainedConfig)})


def _block(model: nn.Module) -> nn.Module:
    return find_sites(model)[0].module


@pytest.mark.parametrize("name", families())
def test_no_mutant_is_silently_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    readings, kept = Readings(), []
    plain, inputs = build(name)
    unaltered, place = outputs(plain, inputs), find_sites(plain)[0].path
    unaltered_structure = structure(_block(plain), place)
    mutants, seen = mutations(_block(plain)), 0
    assert len(mutants) >= FEWEST
    for path, what, change in mutants:
        model = copied(plain)
        change(_block(model).get_submodule(path))
        try:
            before = outputs(model, inputs)
        except Exception:  # the family's own code takes no such value
            continue
        seen += moved(before, unaltered) > 10 * TOLERANCE
        kept.append(model)  # as readings hold for the objects of models that live
        known = readings if structure(_block(model), place) != unaltered_structure else Readings()
        monkeypatch.setattr(survey, "Readings", lambda known=known: known)
        try:
            moe_surgery.apply(model, target="reference")
        except SurgeryError:
            assert torch.equal(outputs(model, inputs), before), f"{path}: {what}: failed, and not as it was"
        else:
            assert moved(outputs(model, inputs), before) <= TOLERANCE, f"{path}: {what}"
    assert seen >= 3, "too few of its mutants compute anything else"
