"""Weights that are pushed into an operated model once it serves: taken up where they reach its blocks, else refused.

An exchanged block has its weights where no later load looks for them: experts that were a list lie in one stacked
parameter, a folded router in another tensor, and vLLM's kernels may hold the others in a layout of their own. vLLM has
many ways in: ``load_weights`` of the model and of every model inside it, a parameter's own ``weight_loader``, reloading
by path and by iterator, the engines of ``update_weights``, and sleeping without a copy of the weights. For the models
that are guarded here, as long as they live, those that call ``load_weights`` become a :class:`Taker`'s, and all others
are shut. For other models each is what it was.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import layerwise

from moe_surgery.errors import SurgeryError

_shut: set[tuple[int, str]] = set()
_CLASSES = {
    "vllm.v1.worker.gpu_worker": (
        "Worker",
        ("reload_weights", "start_weight_update", "update_weights", "finish_weight_update", "sleep"),
    ),
    "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner", ("reload_weights",)),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner", ("reload_weights",)),
}


class PushError(SurgeryError):
    """New weights for a model that was operated on, which goes on with those that it has."""


class Taker(Protocol):
    """Takes weights up: by :meth:`load` as often as they come, all together once :meth:`finish` is called.

    ``finish`` returns the modules that are new in the model. Whatever raises leaves the model as it was.
    """

    def load(self, place: str, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any: ...
    def finish(self) -> dict[str, nn.Module]: ...


class _Door:
    """The way into one guarded model. ``reason``: why there is none; ``taker``: that of an update that is open."""

    def __init__(self, model: nn.Module, reason: str | None, begin: Callable[[nn.Module], Taker], blocks: str) -> None:
        self.taker: Taker | None = None
        self.reason = reason
        self.blocks = blocks
        self._model: ReferenceType[nn.Module] = ref(model)
        self._begin = begin

    def ask(self) -> None:
        """Raise :class:`PushError` if no weights are taken."""
        if self.reason is not None:
            raise self.refusal(self.reason)

    def refusal(self, reason: str) -> PushError:
        return PushError(
            f"new weights can't be loaded into a model whose modules were exchanged ({self.blocks}): {reason}; start "
            "the engine again with them; nothing was changed"
        )

    def open(self) -> None:
        """Begin an update; one that was not finished is forgotten."""
        self.ask()
        self.taker = None
        with self._telling():
            self.taker = self._begin(self._alive())

    def load(self, place: str, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """Take weights up: in the update that is open, or as one of their own."""
        self.ask()
        with self._telling():
            if self.taker is not None:
                return self.taker.load(place, weights, *args, **kwargs)
            taker = self._begin(self._alive())
            result = taker.load(place, weights, *args, **kwargs)
            self._finish(taker)
            return result

    def close(self) -> None:
        """End the update that is open: all that it brought serves from now on."""
        self.ask()
        if self.taker is None:
            raise PushError("no update of the weights was begun, or it failed; nothing was changed")
        with self._telling():
            self._finish(self.taker)
        self.taker = None

    def _finish(self, taker: Taker) -> None:
        for path, module in taker.finish().items():
            shut(module, self.refusal(f"{path} takes its weights from the model's load_weights alone"))

    def _alive(self) -> nn.Module:
        model = self._model()
        assert model is not None  # it is what was called
        return model

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.taker = None
            what = str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
            raise PushError(f"the pushed weights were not taken up, and nothing was changed: {what}") from error
        except BaseException:
            self.taker = None
            raise


_doors: WeakKeyDictionary[nn.Module, _Door] = WeakKeyDictionary()


def guard(
    model: nn.Module, blocks: dict[str, nn.Module], reason: str | None, begin: Callable[[nn.Module], Taker]
) -> None:
    """Have every later load of weights into ``model``, whose ``blocks`` by path are new, taken up or refused.

    ``begin`` makes what takes them up, for ``reason`` none are. What refuses raises :class:`PushError`.
    """
    first, more = next(iter(blocks)), f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
    door = _doors[model] = _Door(model, reason, begin, f"{first}{more}")
    for place in sorted({"", *(prefix for path in blocks for prefix in _prefixes(path))}):
        module = model.get_submodule(place)
        if callable(getattr(module, "load_weights", None)):
            vars(module)["load_weights"] = functools.partial(door.load, place)
    for path, block in blocks.items():
        shut(block, door.refusal(reason or f"{path} takes its weights from the model's load_weights alone"))
    _shut_ways_in()


def shut(block: nn.Module, error: PushError) -> None:
    """Have whatever loads weights into the modules of ``block`` themselves, or their parameters, raise ``error``."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise PushError(str(error))

    for module in block.modules():
        if callable(getattr(module, "load_weights", None)):
            vars(module)["load_weights"] = refuse
        for parameter in module.parameters(recurse=False):
            parameter.weight_loader = refuse  # type: ignore[attr-defined]


def _prefixes(path: str) -> list[str]:
    """The modules around ``path``: ``a`` and ``a.b`` for ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _shut_ways_in() -> None:
    """Have vLLM's own functions ask, once each, under whatever name a module has them that is loaded by now."""
    for name, step in (("initialize_layerwise_reload", _Door.open), ("finalize_layerwise_reload", _Door.close)):
        if _is_first(layerwise, name):
            _shut_function(getattr(layerwise, name), step)
    for place, (kind, methods) in _CLASSES.items():
        if place in sys.modules:
            holder = vars(sys.modules[place])[kind]
            for method in methods:
                if method in vars(holder):
                    _shut_one(holder, method, _ASKING[method])


def _shut_one(holder: Any, name: str, asking: Callable[[Any], Any]) -> None:
    if _is_first(holder, name):
        setattr(holder, name, asking(vars(holder)[name]))


def _is_first(holder: Any, name: str) -> bool:
    """Whether what ``holder`` has under a name is to be shut now; from then on it is."""
    first = (id(holder), name) not in _shut
    _shut.add((id(holder), name))
    return first


def _shut_function(original: Callable[..., Any], step: Callable[[_Door], None]) -> None:
    """Have a function of a model, wherever a module has it, be that ``step`` of a guarded model's door."""

    @functools.wraps(original)
    def asking(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        door = _door_of(model)
        return original(model, *args, **kwargs) if door is None else step(door)

    for module in list(sys.modules.values()):
        for name in [name for name, value in list(getattr(module, "__dict__", {}).items()) if value is original]:
            setattr(module, name, asking)


def _door_of(model: nn.Module | None) -> _Door | None:
    return None if model is None else _doors.get(model)


def _asking_of_reload(original: Any) -> Any:
    @functools.wraps(original)
    def reload_weights(owner: Any, *args: Any, **kwargs: Any) -> Any:
        door = _door_of(owner.get_model())
        if door is None:
            return original(owner, *args, **kwargs)
        door.ask()
        given = inspect.signature(lambda weights_iterator=None, weights_path=None, is_checkpoint_format=True: None)
        if not given.bind(*args, **kwargs).arguments.get("is_checkpoint_format", True):
            raise door.refusal("what is copied by name would have to be in the kernels' layout")
        config = owner.model_config
        names = ("model", "model_weights", "revision")  # which it sets before it reads a tensor
        before = {name: getattr(config, name) for name in names if hasattr(config, name)}
        try:
            return original(owner, *args, **kwargs)
        except BaseException:
            for name, value in before.items():
                setattr(config, name, value)
            raise

    return reload_weights


def _asking_of_start(original: Any) -> Any:
    @functools.wraps(original)
    def start_weight_update(owner: Any, *args: Any, **kwargs: Any) -> Any:
        if (door := _door_of(owner.get_model())) is not None:
            door.ask()
        return original(owner, *args, **kwargs)

    return start_weight_update


def _asking_of_update(original: Any) -> Any:
    @functools.wraps(original)
    def update_weights(owner: Any, *args: Any, **kwargs: Any) -> Any:
        if (door := _door_of(owner.get_model())) is not None:
            door.ask()
            if door.taker is None:
                raise door.refusal("no update was begun that brings its weights to load_weights")
        return original(owner, *args, **kwargs)

    return update_weights


def _asking_of_finish(original: Any) -> Any:
    @functools.wraps(original)
    def finish_weight_update(owner: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(owner, *args, **kwargs)
        except PushError:  # as after an update that failed, so that the next one can be begun
            owner._weight_update_active = False
            owner.weight_transfer_engine.reset_weight_update_target()
            raise

    return finish_weight_update


def _asking_of_sleep(original: Any) -> Any:
    @functools.wraps(original)
    def sleep(owner: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level > 1:  # which gives the weights up
            for model in (owner.get_model(), getattr(owner, "get_draft_model", lambda: None)()):
                if (door := _door_of(model)) is not None:
                    raise door.refusal(door.reason or "there would be none to fall back on")
        return original(owner, level, *args, **kwargs)

    return sleep


_ASKING: dict[str, Callable[[Any], Any]] = {
    "reload_weights": _asking_of_reload,
    "start_weight_update": _asking_of_start,
    "update_weights": _asking_of_update,
    "finish_weight_update": _asking_of_finish,
    "sleep": _asking_of_sleep,
}
