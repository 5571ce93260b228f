"""The router of a replaced block, kept for the hooks on it."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_surgery.targets.likeness import Likeness, Standing

_HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith("_forward_"))


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

    def forward(self, *given: Any, **named: Any) -> Any:
        return vars(self)["_router"].forward(*given, **named)
