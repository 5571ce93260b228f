"""Blocks that fail with tokens [B, S, H]: read in another form, or told apart by what they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from moe_surgery.answers import ShapeOfInput, Structure
from moe_surgery.calling import Calling
from moe_surgery.form import IMAGES, PLANES, Form
from moe_surgery.read.asking import FEW, Asking, crowded_together, spread
from moe_surgery.read.batches import hidden_sizes
from moe_surgery.read.parse.results import all_say, kept_by_all
from moe_surgery.read.parsed import Record
from moe_surgery.read.reading import Broken, Reading, Unfollowed, Unreadable
from moe_surgery.read.record.arguments import arguments_of
from moe_surgery.read.record.attributes import Attributes, asks_for_dimensions
from moe_surgery.read.together import same_experts

_DIMENSIONS = re.compile(r"not enough values to unpack \(expected ([4-9]), got [23]\)")
_ONE_IMAGE = (1, 6)  # rows, and places: in two dimensions 2 and 3


def in_a_form(
    ask: Asking, error: Unfollowed, forms: Iterable[Form], read: Callable[[Calling], Reading]
) -> Reading | None:
    """A reading of a block that failed with its own ``error``, if it takes its tokens in one of ``forms``, else None.

    Raises :class:`Unreadable` where it takes them in one, and can be read in none.
    """
    cause, convolutions = error.__cause__, nn.modules.conv._ConvNd
    of_shapes = error.answered if cause is None else not isinstance(cause, (TypeError, AttributeError))
    if ask.calling.form is not None or not of_shapes:
        return None
    if any(isinstance(layer, convolutions) and prod(layer.kernel_size) > 1 for layer in ask.block.modules()):
        return None  # places are mixed, and no form makes tokens of them
    problem: Unreadable | None = None
    for form in forms:
        try:
            found = read(replace(ask.calling, form=form))
            if any(isinstance(value, ShapeOfInput) and "form" in value.leads for _, value in found.kept):
                raise Unreadable(f"it keeps the shape of its input {form}")
            return found
        except (Unfollowed, Broken):
            continue
        except Unreadable as other:  # its code may run in a form that isn't its own
            problem = problem or other
    if problem is not None:
        raise problem
    return None


def check_images(ask: Asking, width: int, dtype: torch.dtype) -> None:
    """Raise that a block of tokens [B, S, H] does something else with images, if it asks how many dimensions it got."""
    if not asks_for_dimensions(ask.block):
        return
    shape = (*_ONE_IMAGE, width)
    for form in (IMAGES, PLANES):
        images = Asking(ask.records, replace(ask.calling, form=form), ask.parse, ask.inside)
        try:
            found = images(shape, dtype, crowded_together, plain=True)
        except Unfollowed:
            continue
        except Unreadable as error:
            if form.first:  # its code takes its tokens out of whatever it gets
                continue
            raise Unreadable(f"what it does with an input {form} can't be read: {error}") from error
        if form.first or found.tokens != ask(shape, dtype, crowded_together, plain=True).tokens:
            raise Unreadable(f"it does something else with an input {form}")


def takes_images(ask: Asking, made: list[Record], batch: tuple[int, int], width: int, dtype: torch.dtype) -> bool:
    """Whether a block of tokens [B, S, H] is known to take those of images [B, h, w, H] for the same.

    That is what records of the ``batch`` and of one token say, beside those that were ``made`` of it.
    """
    images = Asking(ask.records, replace(ask.calling, form=IMAGES), ask.parse, ask.inside)
    known = [(record.results, record.kept, record.lead) for record in made]
    try:
        found = [
            images((*batch, width), dtype, crowded_together),
            images((1, 1, width), dtype, crowded_together, plain=True),
        ]
        same_experts([*made, *found], made[0].first, made[0].first.router.num_experts)
        more = [*known, *((record.results, record.kept, record.lead) for record in found)]
        return _told(more) == _told(known)
    except Unreadable:
        return False


def _told(records: list[tuple[Structure | None, Attributes, tuple[int, ...]]]) -> tuple[object, object]:
    """What records say of results and attributes."""
    results = all_say((results, lead) for results, _, lead in records)
    return results, kept_by_all(((kept, lead) for _, kept, lead in records), lone=False)


def check_arguments(ask: Asking, state: dict[str, Tensor], error: Unfollowed) -> None:
    """Raise that a block takes more than one tensor, or images, if that is why it failed with its own ``error``."""
    block = ask.block
    try:
        arguments_of(block)
    except Unreadable as reason:
        raise Unfollowed(str(reason), error.operations) from error
    if not isinstance(error.__cause__, (RuntimeError, IndexError, ValueError)):  # as code of other shapes fails
        return
    if wanted := _DIMENSIONS.search(str(error.__cause__)):
        problem = f"it takes an input of {wanted[1]} dimensions, and no tokens [T, H] or [B, S, H]"
        raise Unfollowed(problem, error.operations) from error
    for name, layer in block.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            held = f"{name} ({type(layer).__name__})"
            if isinstance(layer, nn.Conv1d) and not _takes_channels_first(ask, state):  # a block may turn its tokens
                continue
            problem = f"it takes channels before places, as {held} does, and no tokens [..., H]"
            raise Unfollowed(problem, error.operations) from error


def _takes_channels_first(ask: Asking, state: dict[str, Tensor]) -> bool:
    """Whether a block takes channels before places, of however many places."""
    for width in hidden_sizes(state):
        try:
            for places in FEW:
                ask.record((2, width, places), torch.float32, spread, plain=True)
        except Unfollowed:
            continue
        except Unreadable:  # for another reason than its shape
            return True
        return True
    return False
