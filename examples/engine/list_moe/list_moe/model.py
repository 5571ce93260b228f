"""A Qwen2 decoder with :class:`ListMoeBlock` in its layers, and a loader written by hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import Qwen2MoeConfig
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from vllm.model_executor.models.utils import PPMissingLayer, is_pp_missing_parameter, maybe_prefix

from .block import ListMoeBlock

# checkpoint's projection, the parameter that holds it, which part of that
STACKED = [
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
]


class ListMoeLayer(Qwen2DecoderLayer):
    def __init__(
        self,
        config: Qwen2MoeConfig,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, cache_config, quant_config, prefix)
        self.mlp = ListMoeBlock(config, quant_config, f"{prefix}.mlp")


class ListMoeForCausalLM(Qwen2ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent's would build a dense model
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.model = Qwen2Model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), decoder_layer_type=ListMoeLayer
        )
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                self.config.vocab_size,
                self.config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            part: str | int | None = None
            for projection, stacked, shard in STACKED:
                if projection in name:
                    name, part = name.replace(projection, stacked), shard
                    break
            if is_pp_missing_parameter(name, self):
                continue
            parameter = parameters[name]
            if part is None:
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            else:
                parameter.weight_loader(parameter, tensor, part)
            loaded.add(name)
        return loaded
