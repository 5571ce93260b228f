"""Who else could use or change a site's weights: the code and the objects of the model around it.

A block is proven alone. Should a module around it, a hook or an adapter hold one of its children or weights, it would
go on with those of the old block. So whatever can be reached from outside of a site is looked through, by reference and
by name. What isn't found is a name made up at run time and what happens in C.
"""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.models.site import Site
from moe_surgery.read.record.attributes import names_read
from moe_surgery.read.record.reach import functions
from moe_surgery.read.sameness import words
from moe_surgery.weights.moving import moving
from moe_surgery.weights.reach import reachable

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward hook",
    "_backward_hooks": "a backward hook",
    "_state_dict_hooks": "a state_dict hook",
    "_state_dict_pre_hooks": "a state_dict hook",
    "_load_state_dict_pre_hooks": "a load_state_dict hook",
    "_load_state_dict_post_hooks": "a load_state_dict hook",
}
_RUN = ("_forward_pre_hooks", "_forward_hooks")
# A hook whose code has one of these may come to any child of the module it is given.
_BLIND = frozenset(
    "parameters named_parameters buffers named_buffers modules named_modules children named_children get_submodule "
    "get_parameter state_dict load_state_dict _modules _parameters __dict__ vars getattr setattr apply _apply".split()
)
_INTERNAL = frozenset(vars(nn.Module()))
_STORED = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True, eq=False)
class _Inner:
    """A site's modules and tensors: the site's number, and a name relative to the site, "" for itself."""

    site: int
    name: str


@dataclass(eq=False)
class Surroundings:
    """What stands around the sites of one model. ``objection`` says why a site can't be exchanged, if it can't."""

    model: nn.Module
    sites: Sequence[Site]
    _inner: dict[int, _Inner] = field(default_factory=dict)
    _storages: dict[int, _Inner] = field(default_factory=dict)
    _found: dict[int, str] = field(default_factory=dict)
    _names: dict[str, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, site in enumerate(self.sites):
            for name, module in site.module.named_modules():
                self._inner.setdefault(id(module), _Inner(number, name))
            for name, tensor in (*site.module.named_parameters(), *site.module.named_buffers()):
                self._inner.setdefault(id(tensor), _Inner(number, name))
                if tensor.numel() and not tensor.is_meta:
                    self._storages.setdefault(tensor.untyped_storage()._cdata, _Inner(number, name))
        modules = dict(self.model.named_modules())
        self._outside = {path: module for path, module in modules.items() if id(module) not in self._inner}
        self._tree = {id(module) for module in modules.values()}
        parents = [(modules[path], key) for path, _, key in (site.path.rpartition(".") for site in self.sites) if key]
        self._places = {(id(parent), key) for parent, key in parents}
        if self.sites:
            self._look()

    def objection(self, path: str) -> str | None:
        """Why the site at ``path`` can't be exchanged, in one sentence; None if nothing speaks against it."""
        number = next(number for number, site in enumerate(self.sites) if site.path == path)
        return self._found.get(number) or self._named(self.sites[number])

    def _look(self) -> None:
        """Find every reference into a site that isn't the one of its parent."""
        seen: set[int] = set()
        for path, module in self._outside.items():
            self._holdings(path, module, seen, None)
        for number, site in enumerate(self.sites):
            own = set(seen)
            for name, module in site.module.named_modules():
                self._holdings(f"{site.path}.{name}".rstrip("."), module, own, number)

    def _holdings(self, path: str, module: nn.Module, seen: set[int], own: int | None) -> None:
        where = path or "the model"
        for what, value in self._roots(module):
            for found in self._unregistered(value, seen):
                inner = self._inner_of(found)
                if inner is not None and inner.site != own and not _weightless(found):
                    held = self.sites[inner.site].path + (f".{inner.name}" if inner.name else "")
                    self._found.setdefault(
                        inner.site, f"{what.format(where=where)} holds {held}, which would stay as it is"
                    )

    def _inner_of(self, found: Tensor | nn.Module) -> _Inner | None:
        inner = self._inner.get(id(found))
        if inner is None and isinstance(found, Tensor) and not found.is_meta and found.numel():
            try:
                inner = self._storages.get(found.untyped_storage()._cdata)
            except (RuntimeError, NotImplementedError):  # a tensor without a storage of its own
                return None
        return inner

    def _unregistered(self, value: Any, seen: set[int]) -> Iterator[Tensor | nn.Module]:
        """Tensors and modules that ``value`` leads to, also through modules that are not in the model's tree."""
        waiting = [value]
        while waiting:
            for found in reachable([waiting.pop()], seen):
                yield found
                if isinstance(found, nn.Module) and id(found) not in self._tree and id(found) not in seen:
                    seen.add(id(found))
                    waiting.append(vars(found))

    def _roots(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """Everything that a module refers to, with what to call it, but the child that is a site."""
        if isinstance(module, torch.jit.ScriptModule):  # holds what it was given in C
            return
        for name, value in vars(module).items():
            if name in _STORED:
                yield from (
                    (f"{{where}} (as {key})", child)
                    for key, child in value.items()
                    if (id(module), key) not in self._places
                )
            elif name in _HOOKS:
                yield f"{_HOOKS[name]} of {{where}}", value
            elif name not in _INTERNAL:
                yield f"{{where}} (in {name})", value
        if isinstance(module.forward, (FunctionType, MethodType)):
            function = module.forward.__func__ if isinstance(module.forward, MethodType) else module.forward
            yield "the forward of {where}", list(functions(function))
        for cls in type(module).__mro__:
            if cls is nn.Module:
                break
            if cls.__module__.split(".")[0] not in ("torch", "transformers"):
                for name, value in vars(cls).items():
                    if not callable(value) and not name.startswith("__"):
                        yield f"{cls.__name__}.{name}", value

    def _public(self, path: str) -> frozenset[str]:
        """The names that the code of the module at ``path`` may use for what isn't in any site."""
        if path not in self._names:
            prefix = f"{path}." if path else ""
            near = [module for name, module in self._outside.items() if name == path or name.startswith(prefix)]
            self._names[path] = frozenset(itertools.chain.from_iterable(map(_attributes, near)))
        return self._names[path]

    def _named(self, site: Site) -> str | None:
        """Why the code of the modules around a site may use more of it than its output, judged by the names in it."""
        kind = type(site.module).__name__
        private = {part for name, _ in _inside(site.module) for part in name.split(".") if not part.isdigit()}
        private.discard(site.path.rpartition(".")[2])
        for path in around(site.path):
            module = self.model.get_submodule(path)
            where = path or "the model"
            if "_hf_hook" in vars(module) and (moved := moving(module._hf_hook)) is not None:
                return f"{moved} on {where} may move or replace its weights around every call"
            named, private = reached(module), private - self._public(path)
            used = sorted(named & private)
            if used:
                return f"the forward of {where} uses {', '.join(used[:3])}, which lies elsewhere in a swapped block"
            if written := sorted(_written(module) & names_read(site.module)):
                return f"the forward of {where} writes to {', '.join(written[:3])}, which its code reads"
            if {"type", kind} <= named:
                return f"the forward of {where} asks whether its class is exactly {kind}"
            for hooks in _RUN:
                for hook in vars(module)[hooks].values():
                    used = sorted(_words_of(hook) & (private | _BLIND))
                    if used and not _known(hook):
                        return f"{_HOOKS[hooks]} of {where} may reach into it (it names {', '.join(used[:3])})"
        return None


def _weightless(found: Tensor | nn.Module) -> bool:
    """Whether something is a module that holds nothing, such as an activation: several may share one."""
    if isinstance(found, Tensor) or any(vars(found).get(stored) for stored in _STORED):
        return False
    own = [value for name, value in vars(found).items() if name in _HOOKS or name not in _INTERNAL]
    return not any(vars(found)[hooks] for hooks in _HOOKS) and not any(True for _ in reachable(own, set()))


def _attributes(module: nn.Module) -> Iterator[str]:
    """The names by which a module's own values, children and tensors are used."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    yield from (name for name in vars(module) if name not in _INTERNAL)
    for stored in _STORED:
        yield from vars(module)[stored]


def _inside(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((name, child) for name, child in module.named_modules() if name)
    yield from module.named_parameters()
    yield from module.named_buffers()


def around(path: str) -> Iterator[str]:
    """The paths of all modules around a path, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def reached(module: nn.Module) -> frozenset[str]:
    """The names in the code of a module's forward, of a ``__call__`` of its own, and of the methods that they name.

    Where that looks up names at run time, the texts among the module's attributes are names too.
    """
    found = set().union(*(words(code) for code in _run(module)))
    if "getattr" in found:
        found |= {value for value in vars(module).values() if isinstance(value, str)}
    return frozenset(found)


def _run(module: nn.Module) -> list[CodeType]:
    """The code of a module's forward, of a ``__call__`` of its own, and of the methods that they name."""
    kind = type(module)
    found: set[str] = set()
    waiting: list[Any] = [module.forward, _method(kind, "__call__")]
    done: dict[int, CodeType] = {}
    while waiting:
        for function in functions(waiting.pop()):
            if id(function) in done or _library(function):
                continue
            done[id(function)] = function.__code__
            new = set(words(function.__code__)) - found
            found |= new
            waiting += [method for name in new if (method := _method(kind, name)) is not None]
    return list(done.values())


def _written(module: nn.Module) -> frozenset[str]:
    """The attributes that code of a module's forward gives a value, but for those of the module itself."""
    return frozenset().union(*map(_stored, _run(module)))


@lru_cache(maxsize=4096)
def _stored(code: CodeType) -> frozenset[str]:
    found: set[str] = set()
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR" and before not in code.co_varnames[:1]:
            found.add(instruction.argval)
        before = instruction.argval
    return frozenset(found).union(*(_stored(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _method(kind: type, name: str) -> Any:
    """The function behind a method or property of a class below ``nn.Module``."""
    for cls in kind.__mro__:
        if cls is nn.Module:
            return None
        if name in vars(cls):
            value = vars(cls)[name]
            value = getattr(value, "fget", getattr(value, "__func__", value))
            return getattr(value, "__wrapped__", value) if not isinstance(value, FunctionType) else value
    return None


def _library(function: FunctionType) -> bool:
    """Whether a function is transformers' general machinery, which knows no model's children by name."""
    root, _, rest = (function.__module__ or "").partition(".")
    return root == "transformers" and not rest.startswith("models.")


def _words_of(hook: Any) -> frozenset[str]:
    """The names in the code of a hook; of an object or one of its methods, those of its whole class."""
    found: set[str] = set()
    for function in functions(hook):
        found |= set(words(function.__code__))
    bound = hook.__self__ if isinstance(hook, MethodType) else hook
    if not isinstance(bound, (FunctionType, type)) and not isinstance(hook, FunctionType):
        for cls in type(bound).__mro__:
            for value in vars(cls).values() if cls.__module__ not in ("builtins", "functools") else ():
                if isinstance(value, FunctionType):
                    found |= set(words(value.__code__))
    return frozenset(found)


def _known(hook: Any) -> bool:
    """Whether a hook is transformers' own: those record outputs, by general code."""
    return all(_library(function) for function in functions(hook)) and any(True for _ in functions(hook))
