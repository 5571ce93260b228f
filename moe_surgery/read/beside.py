"""Reading one level up: whether a layer adds another child's answer to a block's, for the same tensor.

Some models keep the shared expert beside the block: ``block(x) + shared(x)``. Where the layer's forward does that and
nothing else with either answer, the two are read as one block, a :class:`Pair`.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_surgery.read.reading import Unreadable
from moe_surgery.read.record.layer import Calls, record_layer


class Pair(nn.Module):
    """Two children of a layer under their names, and what the layer makes of them: the sum of their answers."""

    def __init__(self, name: str, block: nn.Module, other_name: str, other: nn.Module) -> None:
        super().__init__()
        self.add_module(name, block)
        self.add_module(other_name, other)
        self.training = False  # of this module alone

    def forward(self, hidden_states: Tensor) -> Tensor:
        total: Tensor = self.block(hidden_states) + self.other(hidden_states)
        return total

    @property
    def block(self) -> nn.Module:
        return next(self.children())

    @property
    def other(self) -> nn.Module:
        """What stands beside the block."""
        return list(self.children())[1]


def beside(layer: nn.Module, name: str) -> str | None:
    """The child of ``layer`` whose answer is added to that of its child ``name``; None if there is none.

    Raises :class:`Unreadable` if the layer's forward can't be followed, or adds up more than two answers to one tensor:
    of branches with other inputs or something behind them, or answers that it uses once more.
    """
    found = {_partner(calls, name) for calls in record_layer(layer)}
    if len(found) != 1:
        raise Unreadable("it does one thing or another with its answer, depending on its arguments")
    return found.pop()


def _partner(calls: Calls, name: str) -> str | None:
    asked = [place for place, call in enumerate(calls) if call.child == name]
    if len(asked) != 1:
        raise Unreadable(f"it calls {name} {len(asked)} times")
    block = place = asked[0]
    while (after := _only_user(calls, place)) is not None and calls[after].child and _source(calls, after) is not None:
        place = after  # a norm, for instance
    total = _only_user(calls, place)
    if total is None or calls[total].what != "add" or len({*calls[total].operands}) != 2:
        return None
    other = end = next(operand for operand in calls[total].operands if operand != place)
    branch: list[str] = []
    while calls[end].child:
        branch.append(calls[end].child)
        source = _source(calls, end)
        if end == _source(calls, block) or source is None:
            break
        end = source
    if not branch or other == _source(calls, block):  # what came before the block, added to what it makes of it
        return None
    if place != block or _source(calls, block) is None or _source(calls, other) != _source(calls, block):
        chain = " and then ".join(reversed(branch))
        raise Unreadable(f"it adds what comes of {chain}, which is not one answer to the same tensor")
    child = branch[0]
    if _only_user(calls, other) is None or [call.child for call in calls].count(child) > 1:
        raise Unreadable(f"it uses {child}, which it adds to it, more than once")
    if any(step not in (block, other) and calls[step].what != "clone" for step in range(min(block, other), total)):
        raise Unreadable(f"it does something else between its calls of {name} and {child}")
    return child


def _only_user(calls: Calls, place: int) -> int | None:
    """The one step that takes what comes of another, and takes it once."""
    users = [user for user, call in enumerate(calls) for operand in call.operands if operand == place]
    return users[0] if len(users) == 1 else None


def _source(calls: Calls, place: int) -> int | None:
    """The one tensor that a step takes, or of which it takes a copy; None if it takes more."""
    call = calls[place]
    if not call.alone or len(call.operands) != 1:
        return None
    source = call.operands[0]
    while calls[source].what == "clone" and calls[source].alone:
        source = calls[source].operands[0]
    return source
