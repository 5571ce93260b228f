"""What is left of a module that was replaced: its class, its plain attributes and the names of its children.

The code around a block may ask it for more than its output. Whatever doesn't depend on where the weights lie is
answered as before; what does is an error of one sentence, and never an ``AttributeError``, which ``hasattr`` would take
for a no.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NoReturn

import torch
from torch import nn

from moe_surgery.errors import SurgeryError
from moe_surgery.read.record.contents import held_by_name
from moe_surgery.targets.given_up import GivenUp
from moe_surgery.weights.reach import has_weights, holds_weights

_INTERNAL = frozenset(vars(nn.Module()))


@dataclass(frozen=True, eq=False)
class Likeness:
    """What a module was, without its weights.

    ``path`` is its path in the model, ``kind`` its class, ``plain`` its attributes, ``moved`` the names of its
    parameters, buffers and of attributes that hold some. A child that has no weights, such as an activation, is there
    itself. ``shapes`` are those of every tensor that ``state_dict`` gives.
    """

    path: str
    kind: type
    plain: dict[str, Any]
    moved: frozenset[str]
    children: Mapping[str, Likeness | nn.Module | None]
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]

    @classmethod
    def of(cls, module: nn.Module, path: str) -> Likeness:
        """The likeness of ``module`` at ``path``; it refers to none of its weights."""
        own = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        moved = {name for name, value in own.items() if holds_weights(value)}
        children: dict[str, Likeness | nn.Module | None] = {}
        for name, child in module._modules.items():
            there = child is None or not has_weights(child)
            children[name] = child if there else cls.of(child, f"{path}.{name}")  # type: ignore[arg-type]
        lasting = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        tensors = {**module._parameters, **lasting}
        return cls(
            path,
            type(module),
            {name: value for name, value in own.items() if name not in moved},
            frozenset(moved | {n for n, t in {**module._parameters, **module._buffers}.items() if t is not None}),
            children,
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items() if tensor is not None},
        )

    def without(self, names: Iterable[str]) -> Likeness:
        """The same for a block that has the buffers ``names`` itself."""
        return replace(self, moved=self.moved.difference(names))

    def beside(self, objects: Mapping[str, Any]) -> Likeness:
        """The same with ``objects`` there themselves: attributes that hold tensors, but none of its weights."""
        return replace(self, plain={**self.plain, **objects}, moved=self.moved.difference(objects))

    def reaches(self, path: str) -> bool:
        """Whether the module or object ``path`` is here, for its attributes to be written to."""
        first, _, rest = path.partition(".")
        child = self.children.get(first)
        if isinstance(child, Likeness):
            return child.reaches(rest)
        return not first or first in self.children or first in self.plain

    def answer(self, name: str, standing: nn.Module) -> Any:
        """The attribute ``name`` for ``standing``, which stands where the module stood.

        Raises :class:`SurgeryError` for weights, and :class:`AttributeError` for what the module didn't have either.
        """
        if name in self.plain:
            return self.plain[name]
        if name in self.moved:
            self.refuse(name)
        if name in self.children:
            child = self.children[name]
            return elsewhere(child) if isinstance(child, Likeness) else child
        for cls in self.kind.__mro__:
            if cls is nn.Module:
                break
            if name in vars(cls):
                found = vars(cls)[name]
                return found.__get__(standing, self.kind) if hasattr(type(found), "__get__") else found
        own = inspect.getattr_static(self.kind, "__getattr__")
        if own is not nn.Module.__getattr__:  # it hands some names on to another module
            return own(standing, name)
        raise AttributeError(f"{self.kind.__name__!r} object has no attribute {name!r}")

    def attributes(self, path: str) -> dict[str, Any]:
        """The plain attributes of the module ``path`` in this one, or of an object in it, to be written to."""
        if not path:
            return self.plain
        first, _, rest = path.partition(".")
        if first not in self.children:  # an object, which is there itself unless it holds weights
            inner = [name for name in rest.split(".") if name]
            held: dict[str, Any] = {}
            if first in self.plain:
                found = reduce(lambda holder, name: held_by_name(holder)[name], inner, self.plain[first])
                held = held_by_name(found)
            return held
        child = self.children[first]
        if isinstance(child, Likeness):
            return child.attributes(rest)
        return {} if child is None else vars(child.get_submodule(rest))  # it has no weights, and is there itself

    def refuse(self, name: str) -> NoReturn:
        what = f"{self.path}.{name}" if name else self.path
        raise SurgeryError(
            f"{what} can't be used: a swapped MoE block holds these weights in its kernels' layout; undo first"
        )

    def check_assignment(self, name: str, value: object) -> None:
        """Raise :class:`SurgeryError` where setting ``name`` would have changed what the module computes."""
        if name in self.moved or isinstance(self.children.get(name), Likeness):
            self.refuse(name)
        if name in self.plain and not _same(self.plain[name], value):
            raise SurgeryError(
                f"{self.path}.{name} can't be changed: the swapped MoE block computes what the block did when it was "
                "replaced; undo first"
            )

    def tensors(self, prefix: str = "") -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Name, shape and dtype of every tensor that the module saved."""
        found = {f"{prefix}{name}": entry for name, entry in self.shapes.items()}
        for name, child in self.children.items():
            if isinstance(child, Likeness):
                found |= child.tensors(f"{prefix}{name}.")
        return found


def _same(one: object, other: object) -> bool:
    if one is other:
        return True
    plain = (bool, int, float, str, bytes, type(None))
    return type(one) is type(other) and isinstance(one, plain) and one == other


class Standing(nn.Module):
    """A module that stands where another one stood, and answers for it.

    It is an instance of that one's class as far as ``isinstance`` goes, and has its attributes beside its own.
    """

    _likeness: Likeness | None = None
    _original: nn.Module | None = None

    @property
    def likeness(self) -> Likeness | None:
        """What this module stands for."""
        return self._likeness

    def stand_for(self, likeness: Likeness) -> None:
        object.__setattr__(self, "_likeness", likeness)
        self.register_load_state_dict_post_hook(_told_by_old_names)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        likeness = vars(self).get("_likeness")
        return type(self) if likeness is None else likeness.kind

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            likeness = vars(self).get("_likeness")
            if likeness is None or name.startswith("__"):
                raise
        return likeness.answer(name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        likeness = vars(self).get("_likeness")
        if likeness is not None and name not in _INTERNAL:
            likeness.check_assignment(name, value)
        super().__setattr__(name, value)

    def keep_original(self, original: nn.Module | None) -> None:
        """Save the weights of ``original``, the module that stood here, as this one's; None if it was given up."""
        object.__setattr__(self, "_original", original)  # not a child

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What the module that stood here saved, under its own names.

        If it was given up, its tensors are there by name, shape and dtype; :class:`SurgeryError` is raised when one of
        them is read, as saving it does.
        """
        if self._likeness is None:
            return super().state_dict(*args, **kwargs)
        prefix, path = kwargs.get("prefix", ""), self._likeness.path
        if self._original is not None:
            found = self._original.state_dict(*args, **kwargs)
        else:
            found = OrderedDict() if kwargs.get("destination") is None else kwargs["destination"]
            for name, (shape, dtype) in self._likeness.tensors().items():
                found[f"{prefix}{name}"] = GivenUp.of(f"{path}.{name}", shape, dtype)
        for name, tensor in self._buffers.items():  # which the module has itself, as they are now
            if name in self._likeness.shapes and tensor is not None:
                found[f"{prefix}{name}"] = tensor if kwargs.get("keep_vars") else tensor.detach()
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        if self._likeness is None:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *more)
            return
        self.check_load(state_dict, prefix)
        object.__setattr__(self, "_loaded_under", prefix)

    def check_load(self, names: Iterable[str], prefix: str) -> None:
        """Raise :class:`SurgeryError` if ``names`` hold one of this module's, which start with ``prefix``."""
        found = next((name for name in names if name.startswith(prefix)), None)
        if found is not None:
            raise SurgeryError(
                f"{found} can't be loaded: a swapped MoE block's weights lie in its kernels' layout; undo first, or "
                "load before operating"
            )

    def _get_name(self) -> str:
        return type(self).__name__

    def overlap(self, likeness: Likeness, written: Iterable[str]) -> list[str]:
        """Names, those that calls have ``written`` among them, that this module's own attributes would answer."""
        mine = {*vars(self), *self._parameters, *self._buffers, *self._modules, *dir(type(self))}
        theirs = {*likeness.plain, *likeness.moved, *likeness.children, *written}
        for cls in likeness.kind.__mro__:
            if cls is nn.Module:
                break
            theirs.update(vars(cls))
        usual = {*dir(nn.Module), *_INTERNAL, "forward", "_get_name"}
        return sorted(name for name in mine & theirs - usual if not name.startswith("__"))


def _told_by_old_names(standing: Standing, keys: Any) -> None:
    """After a load that had none of a module's tensors: what it misses has the names of the module that stood there."""
    likeness, prefix = standing.likeness, vars(standing)["_loaded_under"]
    assert likeness is not None
    missing: list[str] = keys.missing_keys
    missing[:] = [name for name in missing if not name.startswith(prefix)]
    missing += [f"{prefix}{name}" for name in likeness.tensors()]


def elsewhere(likeness: Likeness) -> Elsewhere:
    """What answers for a child of a replaced block."""
    listed = issubclass(likeness.kind, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    return (ListElsewhere if listed else Elsewhere)(likeness)


class Elsewhere(Standing):
    """A child of a replaced block whose weights lie in the kernels' layout: it answers, but it can't be called."""

    def __init__(self, likeness: Likeness) -> None:
        super().__init__()
        self.training = False
        self.stand_for(likeness)

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        assert self._likeness is not None
        self._likeness.refuse("")

    def _refuse_hook(self, *args: object, **kwargs: object) -> NoReturn:
        assert self._likeness is not None
        raise SurgeryError(
            f"a hook on {self._likeness.path} would never be called: a swapped MoE block computes what it did; "
            "undo first, or put the hook on the block"
        )

    register_forward_pre_hook = register_forward_hook = _refuse_hook
    register_full_backward_pre_hook = register_full_backward_hook = register_backward_hook = _refuse_hook


class ListElsewhere(Elsewhere):
    """A list or dict of such children."""

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[Any]:
        keys = self._names()
        return iter(keys if issubclass(self.__class__, nn.ModuleDict) else [getattr(self, key) for key in keys])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [getattr(self, name) for name in self._names()[index]]
        return getattr(self, index if isinstance(index, str) else self._names()[index])

    def _names(self) -> list[str]:
        assert self._likeness is not None
        return list(self._likeness.children)
