"""What operations give on meta tensors. A loop over experts asks the same over and over, and torch answers slowly."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from moe_surgery.read.record.tensor_entries import tensors

_Results = dict[Hashable, tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
_KNOWN: _Results = {}  # the same in every record
_MOST = 1 << 14


class MetaResults:
    """Operations run on meta tensors; those that make one new tensor, once for each form of their operands.

    What real tensors among them hold may tell the result's size; they are told apart in one record only.
    """

    def __init__(self) -> None:
        self._with_real: _Results = {}

    def of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of ``func``."""
        if not _makes_one(func):
            return func(*args, **kwargs)
        key = func, _form(args), _form(kwargs), torch.get_default_dtype()
        alike = all(tensor.is_meta for tensor in tensors((args, kwargs)))
        known = _KNOWN if alike else self._with_real
        if key not in known:
            result = _made(func, args, kwargs)
            if not isinstance(result, Tensor) or not result.is_meta:
                return result
            if len(known) >= _MOST:
                known.clear()
            known[key] = tuple(result.shape), result.stride(), result.dtype
            return result
        shape, stride, dtype = known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    if func is not torch.ops.aten._grouped_mm.default:
        return func(*args, **kwargs)
    # On the meta device it takes bfloat16 alone; real ones take more.
    dtype = args[0].dtype
    narrow = [arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
    return func(*narrow, **{**kwargs, "out_dtype": None}).to(kwargs.get("out_dtype") or dtype)


@functools.cache
def _makes_one(func: Any) -> bool:
    """Whether an operation makes one new tensor, which shares nothing with its operands."""
    schema = func._schema
    alone = not any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
    return alone and len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"


def _form(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else id(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((name, _form(item)) for name, item in value.items())
    return type(value), value
