"""Blocks that put experts' outputs together by an operator of their own, which is a Python function that they register.

Near misses have ``words``, as in :mod:`zoo.others`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .around import Alone
from .others import block

OPERATORS = "operators"
_SCHEMA = "(Tensor rows, Tensor index, Tensor source) -> Tensor"


@torch.library.custom_op("moe_surgery_zoo::added", mutates_args=(), schema=_SCHEMA)
def added(rows: Tensor, index: Tensor, source: Tensor) -> Tensor:
    return rows.scatter_add(0, index, source)


@torch.library.custom_op("moe_surgery_zoo::added_otherwise", mutates_args=(), schema=_SCHEMA)
def added_otherwise(rows: Tensor, index: Tensor, source: Tensor) -> Tensor:
    return rows.scatter_add(0, index, source)


@added_otherwise.register_kernel("cpu")
def _twice(rows: Tensor, index: Tensor, source: Tensor) -> Tensor:
    return rows.scatter_add(0, index, 2 * source)


@torch.library.custom_op(
    "moe_surgery_zoo::added_in_place", mutates_args=("rows",), schema=_SCHEMA.replace("Tensor rows", "Tensor(a!) rows")
)
def added_in_place(rows: Tensor, index: Tensor, source: Tensor) -> Tensor:
    rows.scatter_add_(0, index, source)
    return source.clone()


for _operator in (added, added_otherwise, added_in_place):
    _operator.register_fake(lambda rows, index, source: torch.empty_like(rows))


class Dispatcher:
    """Sorts tokens by their experts, and puts together what these make of them; it is no module."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def sorted(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Any]:
        order = ids.flatten().argsort(stable=True)
        return x[order // ids.shape[-1]], order, ids.flatten().bincount(minlength=self.experts).tolist()

    def together(self, x: Tensor, made: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        made = made * weights.flatten()[order, None]
        return self.added(torch.zeros_like(x), (order // weights.shape[-1])[:, None].expand(-1, x.shape[-1]), made)

    def added(self, rows: Tensor, index: Tensor, source: Tensor) -> Tensor:
        return added(rows, index, source)


class AddsOtherwise(Dispatcher):
    def added(self, rows: Tensor, index: Tensor, source: Tensor) -> Tensor:
        return added_otherwise(rows, index, source)


class AddsInPlace(Dispatcher):
    def added(self, rows: Tensor, index: Tensor, source: Tensor) -> Tensor:
        added_in_place(rows, index, source)
        return rows


@block(OPERATORS)
class AddsByAnOperator(Alone):
    """Of a dispatcher that is no module (torchtitan)."""

    dispatcher: type[Dispatcher] = Dispatcher

    def make_more(self) -> None:
        self.dispatch = self.dispatcher(self.num_experts)

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows, order, counts = self.dispatch.sorted(x, ids)
        parts = [self.expert(e, part) for e, part in enumerate(rows.split(counts))]
        return self.dispatch.together(x, torch.cat(parts), order, weights)


@block(OPERATORS, "(added_otherwise)")
class AddsByAnOperatorWithAnotherKernel(AddsByAnOperator):
    dispatcher = AddsOtherwise


@block(OPERATORS, "added_in_place")
class AddsByAnOperatorInPlace(AddsByAnOperator):
    dispatcher = AddsInPlace


@block(OPERATORS)
class AddsByAnOperatorItself(AddsByAnOperator):
    """The operator is named by the block's own code."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows, order, counts = self.dispatch.sorted(x, ids)
        made = torch.cat([self.expert(e, part) for e, part in enumerate(rows.split(counts))])
        made = made * weights.flatten()[order, None]
        return added(torch.zeros_like(x), (order // weights.shape[-1])[:, None].expand_as(made), made)


@block("rounding", "it computes in bfloat16 on the way")
class ComputesInBfloat16(Alone):
    """Its experts do, whatever the block's dtype is; in bfloat16 that changes nothing."""

    def routed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().routed(x.bfloat16(), weights.bfloat16(), ids).type_as(x)

    def expert(self, number: Any, x: Tensor) -> Tensor:
        e = self.experts[int(number)]
        gate, up = (x @ layer.weight.bfloat16().t() for layer in (e.gate_proj, e.up_proj))
        return (self.act(gate) * up) @ e.down_proj.weight.bfloat16().t()


def _made_with(operator: Any) -> Any:
    def routed(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rows, order, counts = self.dispatch.sorted(x, ids)
        made = torch.cat([self.expert(e, part) for e, part in enumerate(rows.split(counts))])
        made = made * weights.flatten()[order, None]
        return operator(torch.zeros_like(x), (order // weights.shape[-1])[:, None].expand_as(made), made)

    return routed


@block(OPERATORS)
class AddsByAnOperatorAroundItsCode(AddsByAnOperator):
    """The operator is found in the function that its method was defined in."""

    routed = _made_with(added)


@block(OPERATORS, "(added_otherwise)")
class AddsByAnotherAroundItsCode(AddsByAnOperator):
    routed = _made_with(added_otherwise)
