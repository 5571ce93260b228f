"""vLLM plugin: registers the talker model. vLLM calls :func:`register` in each of its processes."""


def register() -> None:
    from vllm import ModelRegistry

    if "NaiveTalkerForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("NaiveTalkerForCausalLM", "naive_talker.model:NaiveTalkerForCausalLM")
