"""The peers from vLLM (0.24 to 0.26, where ``FusedMoE`` is a function): its layers outside an engine, on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_surgery.spec import MoESpec
from moe_surgery.weights.tensors import BlockTensors


@contextmanager
def without_engine() -> Iterator[None]:
    """What vLLM's layers need around them when they are built and called: groups, workspace, forward context.

    Custom operators are on and compilation is off, so that every layer runs vLLM's own CUDA kernels.
    """
    from vllm.config import CompilationConfig, CompilationMode, DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.workspace import init_workspace_manager

    compilation = CompilationConfig(mode=CompilationMode.NONE, custom_ops=["all"])
    config = VllmConfig(compilation_config=compilation, device_config=DeviceConfig("cuda"))
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "nccl")
        initialize_model_parallel(1, 1)
        init_workspace_manager(torch.device("cuda:0"))
        with set_forward_context(None, config, num_tokens=1):
            yield


class VllmBlock(nn.Module):
    """A block of vLLM's layers over the given weights.

    ``fused`` gives the shared expert to ``FusedMoE``, which overlaps it with the routed ones (vLLM's own layer, the one
    that the first version of this library put in). Without it, the shared expert is computed beside ``FusedMoE`` and
    added, as a hand-written model does.
    """

    def __init__(self, spec: MoESpec, tensors: BlockTensors, name: str, *, fused: bool) -> None:
        from vllm.model_executor.layers.fused_moe import FusedMoE
        from vllm.model_executor.layers.linear import ReplicatedLinear
        from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

        super().__init__()
        like = {"params_dtype": tensors.w13.dtype, "bias": False}
        router, experts, shared = spec.router, spec.experts, spec.shared
        default = torch.get_default_dtype()
        torch.set_default_dtype(tensors.w13.dtype)
        try:
            with torch.device("cuda"):
                self.gate = ReplicatedLinear(spec.hidden, experts.num_experts, prefix=f"{name}.gate", **like)
                self.shared_gate, self.shared = None, None
                if shared is not None:
                    if shared.gate is not None:
                        self.shared_gate = ReplicatedLinear(spec.hidden, 1, prefix=f"{name}.shared_gate", **like)
                    self.shared = Qwen2MoeMLP(
                        spec.hidden,
                        shared.width,
                        shared.activation,
                        reduce_results=False,
                        expert_gate=self.shared_gate if fused else None,
                        prefix=f"{name}.shared",
                    )
                self.experts = FusedMoE(
                    num_experts=experts.num_experts,
                    top_k=router.top_k,
                    hidden_size=spec.hidden,
                    intermediate_size=experts.width,
                    renormalize=router.renormalize,
                    shared_experts=self.shared if fused else None,
                    prefix=f"{name}.experts",
                )
        finally:
            torch.set_default_dtype(default)
        self.fused = fused
        self._fill(tensors)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def _fill(self, tensors: BlockTensors) -> None:
        routed = self.experts.routed_experts
        self.gate.weight.copy_(tensors.router)
        routed.w13_weight.copy_(tensors.w13)
        routed.w2_weight.copy_(tensors.w2)
        routed.quant_method.process_weights_after_loading(routed)
        if self.shared is not None:
            assert tensors.shared_gate_proj is not None and tensors.shared_up_proj is not None
            self.shared.gate_up_proj.weight.copy_(torch.cat([tensors.shared_gate_proj, tensors.shared_up_proj]))
            self.shared.down_proj.weight.copy_(tensors.shared_down_proj)
        if self.shared_gate is not None:
            self.shared_gate.weight.copy_(tensors.shared_gate)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] to [T, H]."""
        logits, _ = self.gate(x)
        out: Tensor = self.experts(hidden_states=x, router_logits=logits)
        if self.fused or self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = F.sigmoid(self.shared_gate(x)[0]) * shared
        return out + shared
