"""Blocks that the model gives more than they were read with, such as a mask, or images: read again with that."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from torch import Tensor, nn

from moe_surgery.companion import Companion
from moe_surgery.operate.model_check import WholeModel
from moe_surgery.read.block import read_in_form, read_told
from moe_surgery.read.reading import Reading, Unreadable
from moe_surgery.read.record.arguments import arguments_of
from moe_surgery.read.record.tensor_entries import own_dtype
from moe_surgery.read.sameness import Readings, structure
from moe_surgery.targets.base import Context, Target


def read_again(whole: WholeModel, targets: Mapping[str, Target]) -> dict[str, Reading]:
    """By site, what a block computes that was read without a tensor which the model gives it, and can be replaced so.

    Then every call must give such a tensor, or such an input.
    """
    known, found = Readings(), dict[str, Reading]()
    for path, call in whole.unread.items():
        block, x, value = whole.model.get_submodule(path), whole.inputs.get(path), call.value
        if x is None or not isinstance(value, Tensor):
            continue
        key = call.argument, value.dtype, x.ndim, value.ndim, structure(block, path)
        with suppress(Unreadable):
            reading = known.once(key, partial(_read, block, call.argument, x, value))
            dtype = str(own_dtype(dict(block.named_parameters()))).removeprefix("torch.")
            if targets[path].accepts(reading.spec.built, Context(x.device.type, dtype)) is None:
                found[path] = reading
    return found


def _read(block: nn.Module, argument: str, x: Tensor, value: Tensor) -> Reading:
    if any(a.name == argument and a.role == "hidden_states" for a in arguments_of(block, absent=True).arguments):
        return read_in_form(block, value.ndim)

    def fits(companion: Companion) -> bool:
        return companion.name == argument and companion.fits(value, x)

    return read_told(block, fits)
