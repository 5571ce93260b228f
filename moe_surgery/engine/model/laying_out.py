"""Laying out loaded weights for the kernels, layer by layer, as vLLM does of a whole model when it starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from moe_surgery.engine.model.sites import within
from moe_surgery.errors import SurgeryError

_PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
_TREE = frozenset({"_parameters", "_buffers", "_modules"})

Derived = dict[str, Any]
"""Attributes of a module, beside parameters and buffers, that were made of its weights."""


def lay_out(model: nn.Module, layers: Collection[str], blocks: Collection[str], dtype: Any) -> dict[str, Derived]:
    """Lay out the weights of the modules at the paths ``layers``, and of all in ``blocks``; what the first derived.

    Raises :class:`SurgeryError` for a layer of which it isn't known what it keeps of its weights.
    """
    found: dict[str, Derived] = {}
    for path, module in list(model.named_modules()):
        inside = any(within(path, block) for block in blocks)
        method = getattr(module, "quant_method", None)
        if not (inside or path in layers) or not isinstance(method, QuantizeMethodBase):
            continue
        if type(method) not in _PLAIN:
            raise SurgeryError(f"{path}: it isn't known what {type(method).__name__} makes of its weights")
        before = dict(vars(module))
        method.process_weights_after_loading(module)
        if not inside:
            found[path] = _derived(path, before, vars(module))
    for path, module in _attention(model, layers):
        before, impl = dict(vars(module)), dict(vars(module.impl))
        module.process_weights_after_loading(dtype)
        if _derived(path, impl, vars(module.impl)):
            raise SurgeryError(f"{path}: its attention keeps something of its weights")
        found[path] = found.get(path, {}) | _derived(path, before, vars(module))
    return found


def _attention(model: nn.Module, layers: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The attention that is made ready by what its own layers were loaded with."""
    for path, module in model.named_modules():
        # What vLLM's own loader asks, for which releases before 0.28 have no function.
        ready = getattr(module, "process_weights_after_loading", None)
        if isinstance(module, AttentionLayerBase | MMEncoderAttention) and callable(ready):
            held = {name for name, part in module.named_modules(prefix=path) if part._parameters}
            if held and held.intersection(layers):
                if missing := held.difference(layers):
                    raise SurgeryError(f"{min(missing)}: never loaded, and what is made of it is made with others")
                yield path, module


def _derived(path: str, before: Derived, after: Derived) -> Derived:
    found = {name: after[name] for name in after if name not in _TREE and after[name] is not before.get(name)}
    for name, value in found.items():
        if not isinstance(value, (Tensor, FunctionType, BuiltinFunctionType, bool, int, str)):
            raise SurgeryError(f"{path}: it isn't known what it keeps in {name} of its weights")
    return found
