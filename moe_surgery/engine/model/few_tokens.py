"""vLLM's runner, but that few tokens reach Marlin's kernels without being sorted by expert first.

These kernels take blocks of token and expert pairs, each block of one expert. Another kernel sorts the pairs into
blocks, alone on the GPU, and for one token takes as long as one of the two products does. For few tokens there is
nothing to sort: every pair is a block of its own, the chosen experts as they are say whose, and where its one token is
depends on nothing. Experts that several tokens choose are read once for each, so there must be many more experts than
pairs. The kernels look up whatever was chosen: what a router may choose that doesn't exist is brought within the
experts' range first, by a launch of its own.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.platforms import current_platform
from vllm.scalar_type import ScalarType

from moe_surgery.engine.model.choices import all_chosen_for, always_exist
from moe_surgery.engine.model.routed import stored

BLOCK = 8
"""The least rows that Marlin's kernels multiply at a time."""
_SPARSE = 4
"""How many more experts than pairs there must be: then hardly one in eight pairs has its expert in common."""
_METHODS = "CompressedTensorsWNA16MoEMethod", "AutoGPTQMoEMethod", "AutoAWQMoEMethod"
_ROUTERS = "GroupedTopKRouter", "FusedTopKRouter"
"""vLLM's methods for routed experts, and its routers, with which engines were seen computing so in graphs."""
_module: Any = None
with suppress(ImportError):  # other releases have it elsewhere
    _module = import_module("vllm.model_executor.layers.fused_moe.experts.marlin_moe")
_products = getattr(_module, "_fused_marlin_moe", None)
_TAKEN = frozenset(
    "hidden_states w1 w2 bias1 bias2 w1_scale w2_scale topk_weights num_topk quant_type apply_router_weight_on_input "
    "expert_map block_size_m sorted_token_ids expert_ids num_tokens_post_padded activation activation_func topk_ids "
    "input_global_scale1 input_global_scale2 global_scale1 global_scale2 w1_zeros w2_zeros activation_config".split()
)
"""What the two products and what is between them are given."""
_KNOWN = _products is not None and set(inspect.signature(_products).parameters) >= _TAKEN


def unsorted_for_few(runner: Any) -> bool:
    """Whether the experts of vLLM's ``runner`` may be computed so; the kernels that they get are chosen later."""
    seen = stored(runner.routed_experts) in _METHODS and type(runner.router).__name__ in _ROUTERS
    return _KNOWN and current_platform.is_cuda() and seen


class FewTokensRunner(MoERunner):  # type: ignore[misc]
    """A runner that computes as vLLM's own does; how it has few tokens' experts computed is its own."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        config = self.moe_config
        self._most = most(config.num_logical_experts, config.experts_per_token)
        pairs = self._most * config.experts_per_token
        rows = torch.full((pairs, BLOCK), pairs, dtype=torch.int32)  # no pair's number, so none
        rows[:, 0] = torch.arange(pairs, dtype=torch.int32)
        counts = torch.arange(pairs + 1, dtype=torch.int32) * BLOCK
        device = next(self.routed_experts.parameters()).device
        self._rows, self._counts = rows.flatten().to(device), counts.to(device)
        self._method = self.routed_experts.quant_method
        self._exist: dict[torch.dtype, bool] = {}

    @property
    def sizes_to_ask(self) -> tuple[int, ...]:
        """Further numbers of tokens that a proof must ask about."""
        return () if self._marlin() is None else tuple(sorted({min(2, self._most), self._most, self._most + 1}))

    def _marlin(self) -> Any:
        """The layer's kernels if they are Marlin's, over all of its experts, with nothing put around them."""
        method: Any = self.routed_experts.quant_method
        kernels = getattr(getattr(getattr(method, "moe_kernel", None), "impl", None), "fused_experts", None)
        plain = method is self._method and type(kernels) is _module.MarlinExperts
        if not plain or self.routed_experts.expert_map is not None or self.routed_experts.apply_router_weight_on_input:
            return None
        assert kernels is not None
        return kernels if kernels.input_dtype is None and kernels._lora_context is None else None

    def _apply_quant_method(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        shared_experts_input: Tensor | None,
        input_ids: Tensor | None = None,
        shared_experts_overlapping: bool = False,
    ) -> Any:
        marlin = self._marlin() if 0 < len(hidden_states) <= self._most else None
        if marlin is None:
            return super()._apply_quant_method(
                hidden_states, router_logits, shared_experts_input, input_ids, shared_experts_overlapping
            )
        shared: Any = self._shared_experts
        if shared is not None and not shared_experts_overlapping:
            shared(shared_experts_input, shared._determine_shared_experts_order(shared_experts_input))
        exist = self._always_exist(hidden_states, router_logits)
        with all_chosen_for():
            weights, ids = self.router.select_experts(
                hidden_states=hidden_states,
                router_logits=router_logits,
                topk_indices_dtype=torch.int32,
                input_ids=input_ids,
            )
        if not exist:
            ids = ids.clamp(0, len(self.routed_experts.w13_weight) - 1)
        routed = self._unsorted(marlin, hidden_states, weights, ids)
        if shared_experts_overlapping:
            shared.wait()
        return None if shared is None else shared.output, routed

    def _always_exist(self, x: Tensor, logits: Tensor) -> bool:
        """Whether what is chosen by such ``logits`` always exists. It can't be asked while a graph is captured."""
        if logits.dtype not in self._exist and not torch.cuda.is_current_stream_capturing():
            all_here = logits.shape[-1] == len(self.routed_experts.w13_weight)
            self._exist[logits.dtype] = all_here and always_exist(self.router, x.shape[-1], logits)
        return self._exist.get(logits.dtype, False)

    def _unsorted(self, marlin: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The experts' weighted sum [T, H] of tokens ``x`` [T, H], by weights and ids [T, k]."""
        assert _products is not None
        experts: Any = self.routed_experts
        outputs = _products(
            hidden_states=x,
            w1=experts.w13_weight,
            w2=experts.w2_weight,
            bias1=marlin.w1_bias,
            bias2=marlin.w2_bias,
            w1_scale=marlin.w1_scale,
            w2_scale=marlin.w2_scale,
            topk_weights=weights,
            num_topk=ids.shape[1],
            quant_type=ScalarType.from_id(marlin.quant_type_id),
            apply_router_weight_on_input=False,
            expert_map=None,
            block_size_m=BLOCK,
            sorted_token_ids=self._rows[: ids.numel() * BLOCK],
            expert_ids=ids.flatten(),
            num_tokens_post_padded=self._counts[ids.numel() : ids.numel() + 1],
            activation=experts.activation,
            activation_func=marlin.activation,
            topk_ids=ids,
            input_global_scale1=marlin.a1_gscale,
            input_global_scale2=marlin.a2_gscale,
            global_scale1=marlin.g1_alphas,
            global_scale2=marlin.g2_alphas,
            w1_zeros=marlin.w1_zp,
            w2_zeros=marlin.w2_zp,
            activation_config=marlin.activation_config,
        )
        out = torch.empty_like(x)
        marlin.moe_sum(outputs.view(*ids.shape, -1), out, ids, None)
        return out


def most(experts: int, top_k: int) -> int:
    """The most tokens of which each has ``top_k`` of so many experts that aren't sorted."""
    return max(1, experts // (_SPARSE * top_k))
