"""vLLM plugin: registers both models. vLLM calls :func:`register` in each of its processes."""

MODELS = {
    "UnfusedQwen2MoeForCausalLM": "unfused_moe.qwen2:UnfusedQwen2MoeForCausalLM",
    "UnfusedDeepseekForCausalLM": "unfused_moe.deepseek:UnfusedDeepseekForCausalLM",
}


def register() -> None:
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, where in MODELS.items():
        if name not in known:
            ModelRegistry.register_model(name, where)
