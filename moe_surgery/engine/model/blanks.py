"""What stands in a parameter until it is loaded, so that what was never written to can be told afterwards.

Floats start as NaN, which no sound weight is. Packed integers have no such value: they start as one word of 32 bits,
again and again. By chance a word is that one once in 2^32, so a few that stand alone count as written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0x5B1D93C6
_BY_CHANCE = 3
"""How many words alone, of few, are taken for weights; of many there may be 16 times as many as are to be expected."""
_BYTES = torch.float8_e4m3fn, torch.float8_e8m0fnu
_MAGNITUDE = 0x7F
"""The bits of NaN in e4m3, but for its sign; in e8m0 the eighth bit is part of it."""


def make_blank(data: Tensor) -> bool:
    """Fill ``data`` with what stands for nothing; whether that can be told from what is loaded."""
    if data.dtype in _BYTES:
        data.view(torch.uint8).fill_(0xFF)
        return True
    if data.is_floating_point():
        data.fill_(math.nan)
        return True
    if not _in_words(data):
        return False
    data.view(-1).view(torch.int32).fill_(_WORD)
    return True


def blank(data: Tensor) -> Tensor:
    """Which elements of ``data``, that :func:`make_blank` filled, still are; of its shape."""
    if data.dtype in _BYTES:
        bits = data.view(torch.uint8)
        return bits == 0xFF if data.dtype == torch.float8_e8m0fnu else (bits & _MAGNITUDE) == _MAGNITUDE
    if data.is_floating_point():
        return data.isnan()
    words = data.view(-1).view(torch.int32) == _WORD
    if len(words) > 1:
        beside = torch.zeros_like(words)
        beside[1:] |= words[:-1]
        beside[:-1] |= words[1:]
        alone = words & ~beside
        if int(alone.sum()) <= _BY_CHANCE + (len(words) >> 28):
            words = words & beside
    if data.element_size() == 8:
        return words.view(-1, 2).all(-1).view(data.shape)
    return words.repeat_interleave(4 // data.element_size()).view(data.shape)


def zero(data: Tensor, where: Tensor) -> None:
    """Zero the elements ``where`` says."""
    if data.dtype in _BYTES:
        data = data.view(torch.uint8)
    data.masked_fill_(where, 0)


def _in_words(data: Tensor) -> bool:
    return data.is_contiguous() and data.nbytes % 4 == 0 and data.nbytes > 0
