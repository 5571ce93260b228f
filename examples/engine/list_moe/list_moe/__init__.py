"""vLLM plugin: registers the model. vLLM calls :func:`register` in each of its processes."""


def register() -> None:
    from vllm import ModelRegistry

    if "ListMoeForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("ListMoeForCausalLM", "list_moe.model:ListMoeForCausalLM")
