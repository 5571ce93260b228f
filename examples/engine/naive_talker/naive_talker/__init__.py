"""vLLM plugin: registers both models. vLLM calls :func:`register` in each of its processes."""

MODELS = {
    "NaiveTalkerForCausalLM": "naive_talker.model:NaiveTalkerForCausalLM",
    "OmniTalkerForCausalLM": "naive_talker.omni:OmniTalkerForCausalLM",
}


def register() -> None:
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, where in MODELS.items():
        if name not in known:
            ModelRegistry.register_model(name, where)
