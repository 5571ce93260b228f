"""One kind of block on a GPU, with random weights: what candidates are timed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_surgery.kernels import launch
from moe_surgery.kernels.arguments import BLOCK, Routed, Scales, Terms, Weights
from moe_surgery.kernels.choice import Choice
from moe_surgery.spec import MoESpec
from moe_surgery.targets.folded.fold import fold, folded_terms, is_given
from moe_surgery.weights.tensors import BlockTensors

_MOST_LAYERS = 24
_MANY, _FEW_LAYERS = 1024, 3  # so many tokens use every expert's weights, and a few layers' fill the cache


@dataclass(frozen=True, eq=False)
class Bench:
    """Layers of one kind of block on the current GPU, each with weights of its own."""

    terms: Terms
    layers: tuple[Weights, ...]

    @classmethod
    def of(cls, spec: MoESpec, dtype: str, *, scaled: bool = False) -> Bench:
        """As many layers as a token's experts don't fit into the L2 cache, if there is memory for them.

        ``scaled`` layers have their experts in e4m3.
        """
        _, apart = is_given(spec, dtype)
        wanted = getattr(torch, dtype)

        def layer(seed: int) -> Weights:
            weights = fold(random_tensors(spec, seed=seed, dtype=wanted), beside=apart)
            return in_e4m3(weights) if scaled else weights

        first = layer(0)
        size = first.w13.nbytes + first.w2.nbytes
        touched = max(size * spec.router.top_k // spec.experts.num_experts, 1)
        cache = torch.cuda.get_device_properties(first.w13.device).L2_cache_size
        free = torch.cuda.mem_get_info()[0] // 2 // size
        count = max(1, min(_MOST_LAYERS, 2 * cache // touched + 1, 1 + free))
        return cls(folded_terms(spec, dtype, scaled=scaled), (first, *map(layer, range(1, count))))

    def calls(self, tokens: int, choice: Choice) -> list[Callable[[], Tensor]]:
        """A call of each layer with ``tokens`` random tokens."""
        terms, layers = self.terms, self.layers if tokens < _MANY else self.layers[:_FEW_LAYERS]
        like = self.layers[0].router
        generator = torch.Generator(like.device).manual_seed(tokens)

        def call(weights: Weights) -> Callable[[], Tensor]:
            x = torch.empty(tokens, terms.hidden, device=like.device, dtype=like.dtype).normal_(generator=generator)
            routed = self._routed(tokens, generator) if terms.given else None
            return lambda: launch.run(x, weights, terms, choice, routed)

        return [call(weights) for weights in layers]

    def _routed(self, tokens: int, generator: torch.Generator) -> Routed:
        terms, device = self.terms, generator.device
        scores = torch.rand(tokens, terms.experts, device=device, generator=generator)
        ids = scores.topk(terms.top_k, dim=-1).indices.to(torch.int32)
        weights = torch.rand(tokens, terms.pairs, device=device, generator=generator)
        weights[:, terms.top_k :] = weights[:, :1]  # those of slices are alike
        return Routed(ids, weights)


def random_tensors(
    spec: MoESpec, *, seed: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> BlockTensors:
    """Weights of standard deviation ``fan_in ** -0.5``, and biases where the experts have some."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(*shape: int) -> Tensor:
        made = torch.empty(*shape, device=device, dtype=dtype)
        return made.normal_(std=shape[-1] ** -0.5, generator=generator)

    hidden, experts, shared = spec.hidden, spec.experts, spec.shared
    count, width = experts.num_experts, experts.width
    rows = (2 if experts.gated else 1) * width
    return BlockTensors(
        router=matrix(spec.router.num_experts, hidden),
        w13=matrix(count, rows, hidden),
        w2=matrix(count, hidden, width),
        w13_bias=matrix(count, rows) if experts.biases else None,
        w2_bias=matrix(count, hidden) if experts.biases else None,
        shared_gate_proj=matrix(shared.width, hidden) if shared else None,
        shared_up_proj=matrix(shared.width, hidden) if shared and shared.gated else None,
        shared_down_proj=matrix(hidden, shared.width) if shared else None,
        shared_gate=matrix(1, hidden) if shared and shared.gate else None,
        copied=False,
    )


def in_e4m3(weights: Weights) -> Weights:
    """The same with the experts' weights in e4m3, by a scale that is the same for all blocks of a matrix."""
    w = weights
    matrices = {"w13": w.w13, "w2": w.w2, "shared_gate": w.shared_gate, "shared_up": w.shared_up}
    matrices["shared_down"] = w.shared_down
    held, scales = {}, {}
    for name, matrix in matrices.items():
        if matrix is None:
            continue
        scale = matrix.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max
        held[name] = (matrix / scale).to(torch.float8_e4m3fn)
        blocks = (*matrix.shape[:-2], matrix.shape[-2] // BLOCK, matrix.shape[-1] // BLOCK)
        scales[name] = scale.expand(blocks).contiguous()
    return replace(weights, **held, scales=Scales(**scales))
