"""The router of a replaced block, kept for the hooks on it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.errors import SurgeryError
from moe_surgery.targets.likeness import Likeness, Standing

_HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith("_forward_"))
_last = threading.local()  # what this thread's last call gave and made: hooks stand between `tell` and `forward`


class ObservedRouter(Standing):
    """Stands where a replaced block's router stood, so that hooks on it go on firing.

    It has the router's forward hooks, and computes what the router does, but the swapped block uses none of it: so it
    can't be changed and its weights can't be read or loaded. Each is an error that says so.
    """

    def __init__(self, router: nn.Module, likeness: Likeness) -> None:
        super().__init__()
        for name in _HOOKS:  # the very same dicts: a hook's handle removes it here too, and undoing keeps it
            vars(self)[name] = vars(router)[name]
        object.__setattr__(self, "_router", router)  # not a child: nothing in it is this model's any more
        self.training = router.training
        self.stand_for(likeness)
        self.keep_original(router)

    @property
    def has_hooks(self) -> bool:
        """Whether somebody would notice that the router is called."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def tell(self, x: Tensor) -> None:
        """Call the hooks with the tokens [T, H] and what the router makes of them.

        Raises :class:`SurgeryError` where one puts something else in place of either, as the block wouldn't see it. A
        compiled graph doesn't ask.
        """
        before = _versions(x)
        answer = self(x)
        if torch.compiler.is_compiling():
            return
        given, named, made, then = _last.call
        del _last.call
        same = len(given) == 1 and given[0] is x and not named and answer is made
        if not same or _versions(x) != before or _versions(made) != then:
            place = f"{self.likeness.path}: " if self.likeness is not None else ""
            raise SurgeryError(
                f"{place}a hook changes what this router gets or gives, which the swapped MoE block around it wouldn't "
                "see; remove the hook, or undo"
            )

    def forward(self, *given: Any, **named: Any) -> Any:
        made = vars(self)["_router"].forward(*given, **named)
        if not torch.compiler.is_compiling():
            _last.call = given, named, made, _versions(made)
        return made


def _versions(made: Any) -> list[int]:
    """How often each tensor of a router's input or output was changed in place, where torch counts that."""
    tensors = made if isinstance(made, tuple) else (made,)
    return [one._version for one in tensors if isinstance(one, Tensor) and not one.is_inference()]
