"""Quantised checkpoints of tests and benchmarks: what the field's own tools read out of them is what was written."""

from __future__ import annotations

import pytest
import torch
from engine_examples import PACKAGES
from quantised_checkpoint import FORMATS
from torch import Tensor

WEIGHT = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 16


def in_e2m1(stored: dict[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    return unpack_fp4_from_uint8(stored["weight_packed"], *WEIGHT.shape, dtype=torch.float32)


@pytest.mark.parametrize("form", ["ct_mxfp4", "ct_nvfp4"])
def test_four_bit_floats(form: str) -> None:
    stored = FORMATS[form].quantise(WEIGHT, 0)
    if form == "ct_mxfp4":
        scale = (stored["weight_scale"].float() - 127).exp2().repeat_interleave(32, 1)
    else:
        scale = (stored["weight_scale"].float() / stored["weight_global_scale"]).repeat_interleave(16, 1)
    # Half of the widest step of e2m1, which is from 4 to 6; and in NVFP4 the scale's own rounding, of 6 at most.
    bound = scale * (1 if form == "ct_mxfp4" else 1 + 6 / 16)
    assert ((in_e2m1(stored) * scale - WEIGHT).abs() <= bound).all()


def test_gptq_finds_the_shared_expert_of_the_naive_talker(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks this of every linear layer, by the names that the checkpoint has for its parts."""
    pytest.importorskip("vllm")
    monkeypatch.syspath_prepend(PACKAGES / "naive_talker")
    from naive_talker.model import NaiveTalkerForCausalLM
    from vllm.model_executor.layers.quantization.utils.gptq_utils import is_layer_gptq_quantized

    at = "model.layers.0.mlp.shared_expert"
    parts = [f"{at}.{name}_proj" for name in ("gate", "up", "down")]
    fused = NaiveTalkerForCausalLM.packed_modules_mapping
    assert is_layer_gptq_quantized(f"{at}.gate_up_proj", parts, fused)
    assert not is_layer_gptq_quantized(f"{at}.gate_up_proj", parts[2:], fused)
