"""Convolutions over one place, which map every token as a linear layer does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moe_surgery.weights.layout import over_one_place

_NAMES = frozenset(["conv1d", "conv2d", "conv3d"])
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_USUAL: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def as_linear(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], object_to: Callable[[str], Exception]
) -> Tensor | None:
    """What a convolution called ``name`` of tokens [N, C, ...] or [C, ...] makes, by a linear map of channels put last.

    None if it is no convolution, or of no such tokens, or of no places, which is an error. Raises what ``object_to``
    makes of one over several places.
    """
    if name not in _NAMES:
        return None
    given = {**_USUAL, **dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    x, weight = given["input"], given["weight"]
    channels = x.ndim - weight.ndim + 1  # one row of places may stand alone
    if channels not in (0, 1) or x.shape[channels] != weight.shape[1] * given["groups"] or 0 in x.shape[channels + 1 :]:
        return None
    whole = given["groups"] == 1 and _all(given["stride"], 1) and (given["padding"] == "same" or _none(given))
    if not (whole and over_one_place(weight.shape)):
        raise object_to(f"it convolves over several places, or some of its channels ({name})")
    out: Tensor = F.linear(x.movedim(channels, -1), weight.flatten(1), given["bias"]).movedim(-1, channels)
    return out


def _none(given: Mapping[str, Any]) -> bool:
    return given["padding"] == "valid" or _all(given["padding"], 0)


def _all(sizes: Any, size: int) -> bool:
    return all(one == size for one in (sizes if isinstance(sizes, (list, tuple)) else [sizes]))
