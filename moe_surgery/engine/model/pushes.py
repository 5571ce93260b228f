"""Weights that are pushed into an operated model once it serves: refused, before any is written.

An exchanged block has its weights where no later load looks for them: experts that were a list lie in one stacked
parameter, a folded router in another tensor, and vLLM's kernels may hold the others in a layout of their own. vLLM has
many ways in: ``load_weights`` of the model and of every model inside it, a parameter's own ``weight_loader``, reloading
by path and by iterator, the engines of ``update_weights``, and sleeping without a copy of the weights. Each is shut for
the models that are guarded here, as long as they live; for all others it is what it was.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from torch import nn

from moe_surgery.errors import SurgeryError

_guarded: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_shut: set[tuple[int, str]] = set()
_CLASSES = {
    "vllm.v1.worker.gpu_worker": ("Worker", ("reload_weights", "start_weight_update", "update_weights", "sleep")),
    "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner", ("reload_weights",)),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner", ("reload_weights",)),
}
_LAYERWISE = "initialize_layerwise_reload"


class PushError(SurgeryError):
    """New weights for a model that was operated on."""


def guard(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse every later load of weights into ``model``, whose modules at ``paths`` were exchanged.

    What refuses raises :class:`PushError` naming the first; the model goes on with the weights that it has.
    """
    blocks = tuple(paths)
    if not blocks:
        return
    more = f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
    reason = (
        f"new weights can't be loaded into a model whose modules were exchanged ({blocks[0]}{more}): "
        "start the engine again with them; nothing was changed"
    )

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise PushError(reason)

    for place in sorted({"", *(prefix for path in blocks for prefix in _prefixes(path))}):
        module = model.get_submodule(place)
        if callable(getattr(module, "load_weights", None)):
            vars(module)["load_weights"] = refuse
    for path in blocks:
        for module in model.get_submodule(path).modules():
            if callable(getattr(module, "load_weights", None)):
                vars(module)["load_weights"] = refuse
            for parameter in module.parameters(recurse=False):
                parameter.weight_loader = refuse  # type: ignore[attr-defined]
    _guarded[model] = reason
    _shut_ways_in()


def _prefixes(path: str) -> list[str]:
    """The modules around ``path``: ``a`` and ``a.b`` for ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _shut_ways_in() -> None:
    """Have vLLM's own functions ask, once each, in the modules that are loaded by now."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("vllm", "vllm_omni") and _LAYERWISE in vars(module):
            _shut_one(module, _LAYERWISE, _asking_of_model)
        if name in _CLASSES:
            kind, methods = _CLASSES[name]
            for method in methods:
                if method in vars(vars(module)[kind]):
                    _shut_one(vars(module)[kind], method, _asking_of_sleep if method == "sleep" else _asking_of_owner)


def _shut_one(holder: Any, name: str, asking: Callable[[Any], Any]) -> None:
    if (id(holder), name) not in _shut:
        _shut.add((id(holder), name))
        setattr(holder, name, asking(vars(holder)[name]))


def _asking_of_model(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_layerwise_reload(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _ask(model)
        return original(model, *args, **kwargs)

    return initialize_layerwise_reload


def _asking_of_owner(original: Any) -> Any:
    @functools.wraps(original)
    def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
        _ask(owner.get_model())
        return original(owner, *args, **kwargs)

    return method


def _asking_of_sleep(original: Any) -> Any:
    @functools.wraps(original)
    def sleep(owner: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level > 1:  # the weights would have to be pushed when it wakes up
            for model in (owner.get_model(), getattr(owner, "get_draft_model", lambda: None)()):
                _ask(model)
        return original(owner, level, *args, **kwargs)

    return sleep


def _ask(model: nn.Module | None) -> None:
    if model is not None and model in _guarded:
        raise PushError(_guarded[model])
