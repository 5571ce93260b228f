"""Check first, then act: what a user may call on a model with swapped blocks in it is refused before it has begun.

``Module.to``, ``load_state_dict``, ``save_pretrained`` and pickling go through a model module by module, or write one
file after another; an error from a block half-way through would leave half of it done. So every module around a block
asks the blocks first. Undoing takes the guards away.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moe_surgery.errors import SurgeryError
from moe_surgery.targets.base import StandingBlock


@dataclass(eq=False)
class Guards:
    """The guards on the modules around some swapped blocks.

    ``blocks`` are pairs of a path in ``model`` and the block that is there; ``kept`` says whether the originals are
    still there to be saved.
    """

    model: nn.Module
    blocks: Sequence[tuple[str, StandingBlock]]
    kept: bool
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def put(self) -> None:
        """Put the guards on; an exception leaves none of them."""
        try:
            for path in sorted({around for site, _ in self.blocks for around in _around(site)}):
                self._put_on(self.model.get_submodule(path), path)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the guards away again."""
        while self._undo:
            self._undo.pop()()

    def _put_on(self, module: nn.Module, path: str) -> None:
        prefix = f"{path}." if path else ""
        below = [(name.removeprefix(prefix), block) for name, block in self.blocks if name.startswith(prefix)]

        def convert(inner: Callable[..., Any], fn: Callable[..., Any], recurse: bool = True) -> Any:
            for _, block in below if recurse else ():
                block.check_conversion(fn)
            return inner(fn, recurse)

        def load(_: nn.Module, state_dict: Any, start: str, *rest: Any) -> None:
            for name, block in below:
                block.check_load(state_dict, f"{start}{name}.")

        def save(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            adapter = getattr(module, "_hf_peft_config_loaded", False)
            if not adapter and kwargs.get("state_dict") is None:
                raise SurgeryError(
                    "the model can't be saved: the originals of its swapped MoE blocks were given up (undoable=False); "
                    "nothing was written"
                )
            return inner(*args, **kwargs)

        def reduce(inner: Callable[..., Any], protocol: Any) -> Any:
            below[0][1].__reduce_ex__(protocol)  # which raises, while what else a pickle may fail with is yet to come
            return inner(protocol)

        self._replace(module, "_apply", convert)
        self._replace(module, "__reduce_ex__", reduce)
        self._undo.append(module.register_load_state_dict_pre_hook(load).remove)
        if not self.kept and _pretrained(module):
            self._replace(module, "save_pretrained", save)

    def _replace(self, module: nn.Module, name: str, guard: Callable[..., Any]) -> None:
        """Put ``guard`` before a method of this one module; it is given the method first."""
        own = vars(module)
        inner = getattr(module, name)
        before = own.get(name)

        def undo() -> None:
            if before is None:
                own.pop(name, None)
            else:
                own[name] = before

        self._undo.append(undo)  # first: an interrupt may come in between
        own[name] = functools.wraps(inner)(functools.partial(guard, inner))


def _around(path: str) -> list[str]:
    """The paths of all modules around a path."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, without importing it."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)
