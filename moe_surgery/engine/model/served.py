"""How an engine serves a model, and what that leaves of an operation: quantised, with adapters, over several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from moe_surgery.engine.model.in_e4m3 import not_in_e4m3
from moe_surgery.engine.model.layers import owner
from moe_surgery.engine.model.routed import stored
from moe_surgery.engine.model.sites import EngineSite

TRIED = frozenset(
    {
        "Fp8MoEMethod",
        "Fp8LinearMethod",
        "CompressedTensorsW8A8Fp8MoEMethod",
        "CompressedTensorsWNA16MoEMethod",
        "CompressedTensorsW4A4Mxfp4MoEMethod",
        "CompressedTensorsW4A4Nvfp4MoEMethod",
        "CompressedTensorsLinearMethod",
        "AutoAWQMoEMethod",
        "AutoAWQMarlinLinearMethod",
        "AutoGPTQMoEMethod",
        "AutoGPTQLinearMethod",
        "ModelOptFp8MoEMethod",
        "ModelOptLinearMethod",
    }
)
"""vLLM's methods for quantised layers that engines were operated with; the others are refused until they were."""


def obstacle(config: VllmConfig) -> str | None:
    """Why nothing can be operated on in an engine of this kind."""
    parallel, moving = config.parallel_config, config.parallel_config.eplb_config
    tensor, data = parallel.tensor_parallel_size, parallel.data_parallel_size
    parts = getattr(parallel, "prefill_context_parallel_size", 1)
    over = tensor * data * parts
    shares = f"experts are shared out over {over} ranks, a shared expert over {tensor}"
    asks = "and a proof asks all ranks about the same"
    held = {
        f"sequence parallelism of MoE layers: each rank takes n / {tensor} of n tokens to its experts, {asks}": (
            parallel.use_sequence_parallel_moe
        ),
        f"data parallelism: {shares}; each of {data} groups of ranks has tokens of its own, {asks}": data > 1,
        f"prefill context parallelism: {shares}; each of {parts} groups has a part of a prompt, {asks}": parts > 1,
        f"expert load balancing: each of {over} ranks has its part of the experts and of "
        f"{moving.num_redundant_experts} more, which move every {moving.step_interval} steps from where they were "
        "proven": parallel.enable_eplb,
    }
    found = next((what for what, on in held.items() if on), None)
    return found and f"the swap is not supported under {found}"


def unserved(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block that was read can't be rebuilt as it is stored and served here, if it can't."""
    reasons = chain(_of_storage(item), _of_adapters(item, config), _of_placement(item, config))
    return next(reasons, None)


def unfolded(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block that can be rebuilt as it is stored and served can't have its shared expert folded."""
    if item.stored and (reason := not_in_e4m3(item, config)) is not None:
        return reason
    if config.lora_config is not None:
        return "adapters are put around vLLM's layers, which a folded block doesn't call"
    if config.parallel_config.enable_expert_parallel:
        return "each rank has some of the experts, and a shared expert among them would be on one rank"
    return None


def _listed(item: EngineSite) -> str:
    return ", ".join(item.stored)


def _of_storage(item: EngineSite) -> Iterator[str]:
    if not item.stored:
        return
    assert item.reading is not None
    told = f"its weights are quantised ({_listed(item)})"
    if untried := [name for name in item.stored if name not in TRIED]:
        yield f"{told}, and {', '.join(untried)} was not tried here"
    if item.routed is None:
        yield f"{told}, and its experts would have to be moved into vLLM's layer"
    elif item.routed.routes == "given":
        yield f"{told}, and its routing would have to be made anew, which its parts don't prove"
    router = owner(item.block, item.reading.layout.router)
    if isinstance(router, LinearBase) and stored(router) is not None:
        yield f"its router is quantised ({stored(router)})"
    if any(parameter.is_meta for parameter in item.block.parameters()):
        yield f"{told} while they are loaded, so that no count of their tensors holds"


def _of_adapters(item: EngineSite, config: VllmConfig) -> Iterator[str]:
    lora = config.lora_config
    if lora is None:
        return
    if item.routed is None:
        yield "adapters name the layers of its single experts, which would be moved into vLLM's layer"
    elif item.routed.routes == "given":
        yield "its routing would be made anew, and adapters around it were not proven right"
    if current_platform.is_cpu():
        yield "vLLM's routed layers take no adapters on a CPU"
    if lora.fully_sharded_loras and config.parallel_config.tensor_parallel_size > 1:
        yield "adapters that are shared out over the ranks (fully_sharded_loras) were not proven right"


def _of_placement(item: EngineSite, config: VllmConfig) -> Iterator[str]:
    if not config.parallel_config.enable_expert_parallel:
        return
    if item.routed is None:
        yield "its experts are a list of which each rank has a part, and under expert parallelism each has some experts"
        return
    runner: Any = item.routed.runner
    experts, moe, parallel = runner.routed_experts, runner.moe_config, runner.moe_config.moe_parallel_config
    if moe.ep_size == 1:
        return
    if current_platform.is_cpu():
        yield "vLLM's CPU kernels end the process where experts are on other ranks"
    if moe.num_logical_experts % moe.ep_size:
        yield f"{moe.num_logical_experts} experts can't be shared out evenly over {moe.ep_size} ranks"
    if parallel.use_all2all_kernels or parallel.all2all_backend == "passthrough":
        yield f"tokens are sent between ranks ({parallel.all2all_backend}), and a proof asks all the same"
    if experts.expert_placement_strategy != "linear":
        yield f"experts are placed on ranks in an order of their own ({experts.expert_placement_strategy})"
