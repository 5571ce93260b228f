"""What a serving model takes from one that was loaded beside it: all is looked up first, then copied and assigned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import MoERunner

from moe_surgery.engine.model.layer_book import LayerBook, Snapshot
from moe_surgery.engine.model.laying_out import Derived
from moe_surgery.engine.model.sites import EngineSite, within
from moe_surgery.engine.model.surgery import relist
from moe_surgery.errors import LedgerError, SurgeryError


@dataclass(frozen=True, eq=False)
class Touched:
    """Where ``written`` tensors lie: in the blocks of ``sites``, and in other modules, the ``layers``; both by path."""

    written: frozenset[int]
    sites: Mapping[str, EngineSite]
    layers: frozenset[str]


def touched(model: nn.Module, written: Iterable[Tensor], items: Mapping[str, EngineSite]) -> Touched:
    """Where in ``model``, with the blocks of ``items``, the ``written`` tensors are.

    Raises :class:`SurgeryError` if one isn't there any more.
    """
    wanted = frozenset(map(id, written))
    sites: dict[str, EngineSite] = {}
    layers: set[str] = set()
    found: set[int] = set()
    for path, module in model.named_modules():
        if hit := wanted.intersection(map(id, _held(module).values())):
            found |= hit
            site = next((site for site in items if any(within(path, place) for place in items[site].places())), None)
            if site is None:
                layers.add(path)
            else:
                sites[site] = items[site]
    if found < wanted:
        raise SurgeryError("a weight was loaded into a parameter that its model has replaced since")
    ordered = {path: item for path, item in items.items() if path in sites}
    return Touched(wanted, ordered, frozenset(layers))


def carry_over(serving: nn.Module, model: nn.Module, parts: Touched) -> None:
    """Complete what was loaded into ``model`` in parts by what ``serving`` has as it was loaded.

    Raises :class:`LedgerError` naming what is missing: what is laid out for kernels can't be read any more.
    """
    names = _names(model)
    missing = []
    for path, module, needed in _incomplete(model, parts):
        for name, tensor in needed.items():
            laid_out = tensor.ndim > 1 and getattr(module, "quant_method", None) is not None
            there = (_tensor(serving, known) for known in sorted(names[id(tensor)]))
            old = next((found for found in there if found is not None and found.shape == tensor.shape), None)
            if laid_out or old is None:
                missing.append(f"{path}.{name}".lstrip("."))
            else:
                tensor.data.copy_(old.data)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LedgerError(
            f"{missing[0]}{more}: never loaded, and what is to be laid out with it was; push what belongs together in "
            "one call, or in one update"
        )


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name, if there is one."""
    path, _, own = name.rpartition(".")
    try:
        return _held(model.get_submodule(path)).get(own)
    except AttributeError:
        return None


def _incomplete(model: nn.Module, parts: Touched) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Modules with what wasn't loaded of them: parameters, and in blocks, which go as a whole, buffers."""
    for path in sorted(parts.layers):
        module = model.get_submodule(path)
        yield path, module, _without(module._parameters, parts.written)
    for item in parts.sites.values():
        for place, block in item.places().items():
            for path, module in block.named_modules(prefix=place):
                yield path, module, _without(_held(module), parts.written)


def _without(held: Mapping[str, Tensor | None], written: Collection[int]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in held.items() if tensor is not None and id(tensor) not in written}


def adoption(
    serving: nn.Module, model: nn.Module, parts: Touched, derived: Mapping[str, Derived], new: Mapping[str, nn.Module]
) -> list[Callable[[], object]]:
    """Steps that give ``serving`` the loaded layers and the ``new`` modules of ``model``; none of them can fail.

    ``derived`` is what laying out left beside the parameters. Raises :class:`SurgeryError` where the two models differ.
    """
    steps: list[Callable[[], object]] = []
    mine, theirs = _names(serving), _names(model)
    for path in sorted({*parts.layers, *derived}):
        old, fresh = serving.get_submodule(path), model.get_submodule(path)
        before, after = _held(old), _held(fresh)
        if type(old) is not type(fresh) or before.keys() != after.keys():
            raise SurgeryError(f"{path}: the layer that serves is not the one that was loaded")
        for name, tensor in after.items():
            if name not in old._parameters and id(tensor) not in parts.written:
                continue
            if before[name].is_meta:
                raise SurgeryError(f"{path}.{name}: it was put away for a reload that was begun past this one")
            if before[name].shape != tensor.shape or before[name].dtype != tensor.dtype:
                raise SurgeryError(f"{path}.{name}: it is laid out otherwise than before")
            if mine[id(before[name])] != theirs[id(tensor)]:
                raise SurgeryError(f"{path}.{name}: it is tied to another weight in one model, and not in the other")
            steps.append(partial(before[name].data.copy_, tensor.data))
        for name, value in derived.get(path, {}).items():
            if not isinstance(value, (bool, int, str)):
                steps.append(partial(setattr, old, name, value))
            elif vars(old).get(name) != value:
                raise SurgeryError(f"{path}: its {name} is {value}, and was {vars(old).get(name)}")
    exchanged: dict[nn.Module, nn.Module] = {}
    for path, module in new.items():
        parent, _, name = path.rpartition(".")
        old = serving.get_submodule(path)
        exchanged[old] = module
        runners = _runners(module)
        exchanged |= dict(zip(_runners(old), runners, strict=True))
        steps.append(partial(serving.get_submodule(parent).register_module, name, module))
    steps.append(partial(relist, serving, exchanged))
    return steps


def _runners(module: nn.Module) -> list[MoERunner]:
    return [part for part in module.modules() if isinstance(part, MoERunner)]


def registered(book: LayerBook, new: Iterable[nn.Module]) -> Snapshot:
    """The register of a serving model with the routed layers of ``new`` modules in place of those of their names."""
    entries = book.snapshot()
    for runner in (runner for module in new for runner in _runners(module)):
        if runner.layer_name not in entries.layers:
            raise SurgeryError(f"{runner.layer_name} is not registered in the model that serves")
        entries.layers[runner.layer_name] = runner
    return entries


def _held(module: nn.Module) -> dict[str, Tensor]:
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _names(model: nn.Module) -> dict[int, frozenset[str]]:
    """All names of each tensor of a model, by its identity."""
    found: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in _held(module).items():
            found.setdefault(id(tensor), set()).add(f"{path}.{name}".lstrip("."))
    return {key: frozenset(names) for key, names in found.items()}
