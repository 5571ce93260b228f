"""Which block of transformers' model each of vLLM's blocks stands for, told by the names of the checkpoint's tensors.

Both sides name the same tensors: transformers by its conversions, vLLM by the mapper of its model. A tensor of
transformers' block so says which layer of vLLM's it goes to; and a layer has one block, or blocks of the same names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from moe_surgery.models.partial import Partial


def pair(model: nn.Module, blocks: Sequence[str], weights: Partial, sites: Sequence[str]) -> dict[str, str]:
    """The path of transformers' site that each path in ``blocks`` stands for; those that can't be told are left out.

    ``model`` is vLLM's, of which ``blocks`` are the paths of blocks; ``sites`` those of the model behind ``weights``.
    """
    mapped = {site: _common(_mapped(weights.sources(site), model)) for site in sites}
    ways: tuple[tuple[Callable[[str], Any], Mapping[str, str]], ...] = (
        (str, mapped),
        (_layer, mapped),
        (str, {site: site for site in sites}),
        (_numbers, {site: site for site in sites}),
    )
    found: dict[str, str] = {}
    for key, names in ways:
        theirs = defaultdict(list)
        for site in sites:
            if site not in found.values() and key(names[site]):
                theirs[key(names[site])].append(site)
        mine = defaultdict(list)
        for block in blocks:
            if block not in found:
                mine[key(block)].append(block)
        found |= {
            few[0]: theirs[name][0] for name, few in mine.items() if len(few) == 1 and len(theirs.get(name, ())) == 1
        }
    return found


def _mapped(names: Sequence[str], model: nn.Module) -> list[str]:
    """Names of a checkpoint's tensors as vLLM's model has them, before its own loader changes their ends."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return list(names)
    mapped: list[str] = mapper.apply_list(list(names))
    return mapped


def _common(names: Sequence[str]) -> str:
    """The module that all of these tensors lie in."""
    parts: list[str] = []
    for step in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(step)) > 1:
            break
        parts.append(step[0])
    return ".".join(parts)


def _layer(path: str) -> str:
    """A path up to its last number; empty where it has none."""
    parts = path.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdigit())
