"""Reading every site of a model; sites of the same structure are read once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.collection import uncollected
from moe_surgery.find.check import check_site
from moe_surgery.find.result import Reading, Site, Unreadable
from moe_surgery.read import read
from moe_surgery.read_experts import experts_modules, read_experts
from moe_surgery.targets.base import SwappedBlock
from moe_surgery.tree import find_sites

_INTERNAL = frozenset(vars(nn.Module()))


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A site with what was read there, or why it could not be read; neither for a block swapped in before."""

    site: Site
    reading: Reading | None
    unread: str | None

    @property
    def swapped(self) -> bool:
        return isinstance(self.site.module, SwappedBlock)


def survey(model: nn.Module) -> tuple[Surveyed, ...]:
    """Every site of ``model``, read. Where only a block's module of experts can be read, that module is the site."""
    known: dict[Hashable, Reading | str] = {}
    shared = _shared_modules(model)
    return tuple(_survey(site, known, shared) for site in find_sites(model))


def _survey(site: Site, known: dict[Hashable, Reading | str], shared: dict[int, list[str]]) -> Surveyed:
    if isinstance(site.module, SwappedBlock):
        return Surveyed(site, None, None)
    try:
        return _whole(site, known, shared)
    except Unreadable as error:
        inside = _inside(site, known, shared, str(error))
        return inside if inside is not None else Surveyed(site, None, str(error))


def _whole(site: Site, known: dict[Hashable, Reading | str], shared: dict[int, list[str]]) -> Surveyed:
    _check_place(site, shared)
    check_site(site.module)
    return Surveyed(site, _read(site.module, known, read), None)


def _inside(
    site: Site, known: dict[Hashable, Reading | str], shared: dict[int, list[str]], reason: str
) -> Surveyed | None:
    """The only module of experts inside a block that can't be read for ``reason``, if it can be."""
    found = list(experts_modules(site.module))
    if len(found) != 1:
        return None
    path, module = found[0]
    inner = Site(f"{site.path}.{path}" if site.path else path, module)
    try:
        _check_place(inner, shared)
        check_site(module, inputs=3)
        return Surveyed(inner, replace(_read(module, known, read_experts), around=reason), None)
    except Unreadable:
        return None


def _check_place(site: Site, shared: dict[int, list[str]]) -> None:
    if not site.path:
        raise Unreadable("it is the whole model; a block can be replaced only inside a model")
    if len(shared[id(site.module)]) > 1:
        raise Unreadable(f"it is one module at several places: {', '.join(shared[id(site.module)])}")


def _read(module: nn.Module, known: dict[Hashable, Reading | str], reader: Callable[[nn.Module], Reading]) -> Reading:
    key = structure(module)
    result = known.get(key) if key is not None else None
    if result is None:
        try:
            with uncollected():
                result = reader(module)
        except Unreadable as error:
            result = str(error)
        if key is not None:
            known[key] = result
    if isinstance(result, str):
        raise Unreadable(result)
    return result


def _shared_modules(model: nn.Module) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return places


def structure(module: nn.Module) -> Hashable | None:
    """A key that two modules share only if their forwards must do the same; None where that can't be told.

    It holds the class, forward and plain attributes of every submodule, the shape and dtype of every tensor, and the
    identity of configs. A forward patched onto an instance, or an attribute of an unknown kind, gives None.
    """
    parts: list[Hashable] = []
    for path, child in module.named_modules(remove_duplicate=False):
        attributes: list[Hashable] = []
        for name, value in sorted(vars(child).items()):
            known = _attribute(name, value)
            if known is None:
                return None
            attributes.append((name, known))
        parts.append((path, type(child), type(child).forward, tuple(attributes)))
    return tuple(parts)


def _attribute(name: str, value: Any) -> Hashable | None:
    if name in ("_parameters", "_buffers"):
        return tuple((key, _tensor(tensor)) for key, tensor in value.items())
    if name == "_modules":
        return tuple(value)
    if name in _INTERNAL and isinstance(value, (dict, set)):
        return ("internal", len(value))  # hooks and the like, which check_site refuses unless they are empty
    return _plain(value)


def _plain(value: Any) -> Hashable | None:
    if value is None:
        return ("none",)
    if isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type)):
        return (type(value).__name__, repr(value) if isinstance(value, float) else value)
    if isinstance(value, (tuple, list)):
        items = tuple(_plain(item) for item in value)
        return None if None in items else (type(value).__name__, items)
    if hasattr(value, "to_dict") and not isinstance(value, (nn.Module, Tensor)):
        return ("config", id(value))
    return None


def _tensor(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device.type)
