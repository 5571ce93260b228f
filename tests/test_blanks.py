"""What wasn't written to a parameter can be told afterwards, whatever its dtype is."""

from __future__ import annotations

import pytest
import torch

from moe_surgery.engine.model.blanks import blank, make_blank, zero

FLOATS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
WHOLE = (torch.int32, torch.uint8, torch.int8, torch.int64)


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype in FLOATS:
        return torch.randn(shape, generator=generator).to(dtype)
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return torch.randint(least, most, shape, generator=generator, dtype=torch.int64).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS + WHOLE)
def test_what_was_written_and_what_was_not(dtype: torch.dtype) -> None:
    data = torch.empty(4, 6, 8, dtype=dtype)
    assert make_blank(data)
    assert blank(data).all()
    values = drawn(dtype, 4, 6, 8)
    data[:2] = values[:2]
    data[3, :, :4] = values[3, :, :4]
    wanted = torch.zeros(4, 6, 8, dtype=torch.bool)
    wanted[2] = wanted[3, :, 4:] = True
    assert torch.equal(blank(data), wanted)
    zero(data, blank(data))
    assert not blank(data).any()
    assert not data[2].float().any()
    assert torch.equal(data[:2].float(), values[:2].float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_a_word_that_is_the_blank_one_by_chance_is_no_gap(dtype: torch.dtype) -> None:
    data = torch.empty(2, 64, dtype=dtype)
    make_blank(data)
    by_chance = data[0, : 4 // data.element_size()].clone()
    data.copy_(drawn(dtype, 2, 64))
    data[1, 8 : 8 + len(by_chance)] = by_chance
    assert not blank(data).any()


def test_what_has_no_words_to_fill_is_told() -> None:
    assert not make_blank(torch.empty(3, dtype=torch.int8))
    assert not make_blank(torch.empty(0, dtype=torch.int32))
