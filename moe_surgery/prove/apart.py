"""How far apart two blocks' answers to the same call are, and the attributes that they wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.answers import structured
from moe_surgery.read.record.state import unwritten
from moe_surgery.targets.convention import Convention

_AGAIN = 4  # times
SLACK = 8.0
"""How many times as far apart as one rounding the same operations may be."""


def differences(what: str, old: Any, new: Any) -> Iterator[str]:
    """Why what the same operations made of the same input differs in two blocks, if it does."""
    if type(old) in (dict, list, tuple) and form(old) == form(new):
        for one, other in zip(leaves(old), leaves(new), strict=True):
            yield from differences(what, one, other)
        return
    if not isinstance(old, Tensor) and type(old) is type(new) and old == new:  # a shape, or a plain value
        return
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or (old.shape, old.dtype) != (new.shape, new.dtype):
        yield f"the new block's {what} is not of the old one's form"
    elif not old.dtype.is_floating_point:
        if not torch.equal(old, new):
            yield f"the new block's {what} is another than the old one's"
    elif not torch.equal(old.isfinite(), new.isfinite()):
        yield f"the new block's {what} is not finite where the old one's is, or the other way round"
    else:
        finite = old.isfinite()
        distance, size = float((old - new)[finite].double().norm()), float(old[finite].double().norm())
        if distance > (bound := SLACK * torch.finfo(old.dtype).eps) * size:
            relative = distance / size if size else float("inf")
            yield f"the new block's {what} is {relative:.2g} from the old one's; {bound:.2g} are allowed"


def attribute(block: nn.Module, path: str, name: str) -> Any:
    owner: Any = block
    for part in path.split(".") if path else ():
        owner = owner[part] if type(owner) is dict else getattr(owner, part)
    return owner.get(name) if type(owner) is dict else getattr(owner, name, None)


def leaves(answer: Any) -> list[Any]:
    found: list[Any] = []
    structured(answer, lambda value, _: found.append(value))
    return found


def form(answer: Any) -> str:
    """Types, shapes and dtypes of an answer, as text."""

    def leaf(value: Any, _: str) -> Any:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return type(value).__name__

    found = structured(answer, leaf)
    return f"{type(answer).__name__} {found}"


def unsteady(block: nn.Module, convention: Convention, given: Mapping[str, Tensor]) -> bool:
    """Whether a block, called with the tensors ``given`` by role, answers otherwise when it is asked again."""
    first: list[Any] | None = None
    for _ in range(_AGAIN):
        with torch.no_grad(), unwritten(block):
            answer = block(*convention.calling.placed(given))
            wrote = [attribute(block, path, name) for (path, name), _ in convention.written]
        found = [form(answer), *leaves(answer), *wrote]
        first = first or found
        if len(found) != len(first) or any(
            True for one, other in zip(first, found, strict=True) for _ in differences("", one, other)
        ):
            return True
    return False
