"""Random values for the MoE parts of a model, such that leaving any part out shows in the outputs.

Models initialise correction biases with zeros, scales with ones and weights with values so small that experts hardly
matter; two models that differ in such a part would compute the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Where MoE blocks and the layers' shared MLPs lie; other parts keep their own initialisation.
PLACES = re.compile(
    r"(^|\.)(mlp|ffn|feed_forward|block_sparse_moe|shared_mlp|moe|mixer|experts|router|self_attention\.experts)\."
)
# State-space and convolution tensors may not take any value.
KEPT = re.compile(r"(^|\.)(A_log|dt_bias|D|conv1d\.\w+)$")
_STD = 0.15


def fill(model: nn.Module, generator: torch.Generator, shift: Mapping[str, float]) -> None:
    """Fill the MoE parts of ``model`` in place; ``shift`` is added to tensors whose names end as its keys do."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            if PLACES.search(name) and not KEPT.search(name):
                _fill(tensor, generator)
            for ending, value in shift.items():
                if name.endswith(ending):
                    tensor.add_(value)


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    if not tensor.is_floating_point():
        if tensor.ndim == 2:  # a table of expert ids for each token: distinct ones
            ids = torch.rand(tensor.shape[0], 8, generator=generator).argsort(-1)
            tensor.copy_(ids[:, : tensor.shape[1]])
    elif tensor.ndim >= 2:
        tensor.normal_(0, _STD, generator=generator)
    elif tensor.ndim == 1:
        spread = 0.2 if bool((tensor == 1).all()) else 0.1
        tensor.add_(torch.empty_like(tensor).normal_(0, spread, generator=generator))
    else:
        tensor.mul_(1.25)
