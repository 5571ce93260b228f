"""Blocks of the example models, each changed as somebody might, loaded by vLLM's own loader with and without surgery.

python tests/engine_variants.py FOLDER OUT RANK WORLD PORT     # what :func:`outcomes` starts, once per rank

FOLDER holds a checkpoint of each kind of model. An engine would add nothing but time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engine_examples import environment
from hanging import HANG

TOKENS = (1, 7, 300)
Change = Callable[[Any], None]


def outcomes(folder: Path, tmp: Path, world: int, port: int) -> list[dict[str, dict[str, Any]]]:
    """For each rank what became of every variant: its ``outcome`` and reason, and how far its outputs are apart."""
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(tmp / f"{rank}.json"), str(rank), str(world), str(port)],
            env=environment(tmp),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for child in children:
            log, _ = child.communicate(timeout=HANG)
            assert child.returncode == 0, log
    finally:
        for child in children:
            child.kill()
    return [json.loads((tmp / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


def _changed(forward: Callable[[Any, Any], Any]) -> Change:
    """The block with another forward on the instance."""

    def change(block: Any) -> None:
        block.forward = lambda hidden_states: forward(block, hidden_states)

    return change


def _wrapped(path: str, then: Callable[[Any], Any]) -> Change:
    """The block with a submodule that does something more, patched onto the instance."""

    def change(block: Any) -> None:
        module = block.get_submodule(path)
        before = module.forward
        module.forward = lambda *args, **kwargs: then(before(*args, **kwargs))

    return change


def _of_another_class(path: str, then: Callable[[Any], Any]) -> Change:
    """The block with a submodule of a class of its own."""

    def change(block: Any) -> None:
        module = block.get_submodule(path)
        kind = type(module)
        module.__class__ = type("Own", (kind,), {"forward": lambda self, *args: then(kind.forward(self, *args))})

    return change


def _first(then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda result: (then(result[0]), result[1])


def _fused(block: Any, x: Any) -> tuple[Any, Any, Any]:
    """The routed experts' output, the shared expert's, and its gate's."""
    import torch.nn.functional as F

    logits, _ = block.gate(x)
    return (
        block.experts(hidden_states=x, router_logits=logits),
        block.shared_expert(x),
        F.sigmoid(block.shared_expert_gate(x)[0]),
    )


def _twice(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    return routed + gate * shared + gate * shared


def _ungated_once(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    return routed + gate * shared + shared


def _residual(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    return routed + gate * shared + x


def _other_input(block: Any, x: Any) -> Any:
    routed, _, gate = _fused(block, x)
    return routed + gate * block.shared_expert(2 * x)


def _normed(block: Any, x: Any) -> Any:
    import torch.nn.functional as F

    routed, _, gate = _fused(block, x)
    return routed + gate * block.shared_expert(F.rms_norm(x, (x.shape[-1],)))


def _rolled(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    return routed + gate * shared.roll(1, 0)


def _by_batch(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    return routed + gate * shared if x.shape[0] < 128 else routed


def _scaled(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    return 2.5 * (routed + gate * shared)


def _gate_of_routed(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    return gate * (routed + shared)


def _experts_twice(block: Any, x: Any) -> Any:
    routed, shared, gate = _fused(block, x)
    logits, _ = block.gate(x)
    return routed + block.experts(hidden_states=x, router_logits=-logits) + gate * shared


def _scaled_logits(block: Any, x: Any) -> Any:
    import torch.nn.functional as F

    routed = block.experts(hidden_states=x, router_logits=2 * block.gate(x)[0])
    return routed + F.sigmoid(block.shared_expert_gate(x)[0]) * block.shared_expert(x)


def _scale_in_layer(block: Any) -> None:
    block.experts.routed_scaling_factor = 2.5


def _scale_in_both(block: Any) -> None:
    block.experts.routed_scaling_factor = 2.5
    _changed(_scaled)(block)


def _routed_of_list(block: Any, x: Any) -> tuple[Any, Any]:
    """This rank's part of the routed experts' output of a list, and the shared expert's as it is."""
    import torch
    import torch.nn.functional as F

    top, ids = torch.topk(F.softmax(block.gate(x)[0], dim=-1, dtype=torch.float32), block.top_k, dim=-1)
    top = (top / top.sum(dim=-1, keepdim=True)).to(x.dtype)
    routed = sum((top * (ids == e)).sum(dim=-1, keepdim=True) * expert(x) for e, expert in enumerate(block.experts))
    return routed, F.sigmoid(block.shared_expert_gate(x)[0]) * block.shared_expert(x)


def _whole_over_ranks(block: Any, x: Any) -> Any:
    """A shared expert that every rank holds, divided before the sum over the ranks."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    routed, shared = _routed_of_list(block, x)
    return tensor_model_parallel_all_reduce(routed + shared / block.tp_size)


def _whole_in_sum(block: Any, x: Any) -> Any:
    """One that every rank adds before the sum, and so counts once for each."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    routed, shared = _routed_of_list(block, x)
    return tensor_model_parallel_all_reduce(routed + shared)


def _whole_on_first_rank(block: Any, x: Any) -> Any:
    from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce

    routed, shared = _routed_of_list(block, x)
    return tensor_model_parallel_all_reduce(routed + shared if get_tensor_model_parallel_rank() == 0 else routed)


def _summed_apart(block: Any, x: Any) -> Any:
    from vllm.distributed import tensor_model_parallel_all_reduce

    routed, shared = _routed_of_list(block, x)
    return tensor_model_parallel_all_reduce(routed) + shared


def _unsummed(block: Any, x: Any) -> Any:
    """What the layer around the block would sum up."""
    routed, shared = _routed_of_list(block, x)
    return routed + shared


def _inside(block: Any, x: Any, **more: Any) -> Any:
    """What a block computes whose shared expert, with its gate, is inside vLLM's layer."""
    return block.experts(hidden_states=x, router_logits=block.gate(x)[0], **more)


def _summed_inside(block: Any) -> None:
    """A shared expert that is summed over the ranks before it is added to what is summed over the ranks."""
    block.shared_expert.down_proj.reduce_results = True


def _called_otherwise(block: Any) -> None:
    inside = block.experts.shared_experts
    before = inside.forward
    inside.forward = lambda x, order: before(2 * x, order)


def _other_norm(block: Any) -> None:
    experts = block.experts.routed_experts
    experts.renormalize = not experts.renormalize


def _own_method(path: str, name: str) -> Change:
    """The block with a method of a part patched onto it."""

    def change(block: Any) -> None:
        owner = block
        for part in path.split("."):
            owner = getattr(owner, part)
        before = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: 2 * before(*args, **kwargs))

    return change


def _another_caller(block: Any) -> None:
    inside = block.experts.shared_experts
    kind = type(inside)
    inside.__class__ = type("Own", (kind,), {"forward": lambda self, x, order: kind.forward(self, 2 * x, order)})


def _hooked(block: Any) -> None:
    block.shared_expert.down_proj.register_forward_hook(lambda layer, given, out: (2 * out[0], out[1]))


SUMMED_LATER = "a sum left to the layer"
FUSED = "fused_qwen2"
"""vLLM's own class of what the example unfused_qwen2 unfuses; its blocks are to be folded."""
CHECKPOINTS = {FUSED: "unfused_qwen2"}
"""Kinds that have no checkpoint of their own, and whose they take."""
BUILT: dict[str, tuple[str, Change]] = {
    "as it is": ("unfused_qwen2", lambda block: None),
    "shared expert twice": ("unfused_qwen2", _changed(_twice)),
    "shared expert gated and ungated": ("unfused_qwen2", _changed(_ungated_once)),
    "extra residual": ("unfused_qwen2", _changed(_residual)),
    "another input for the shared expert": ("unfused_qwen2", _changed(_other_input)),
    "a norm before the shared expert": ("unfused_qwen2", _changed(_normed)),
    "another token's shared expert": ("unfused_qwen2", _changed(_rolled)),
    "a branch on the batch size": ("unfused_qwen2", _changed(_by_batch)),
    "a scale on all": ("unfused_qwen2", _changed(_scaled)),
    "a gate on all": ("unfused_qwen2", _changed(_gate_of_routed)),
    "experts called twice": ("unfused_qwen2", _changed(_experts_twice)),
    "logits times two": ("unfused_qwen2", _changed(_scaled_logits)),
    "a scale in vLLM's layer": ("unfused_qwen2", _scale_in_layer),
    "a scale in vLLM's layer and on all": ("unfused_qwen2", _scale_in_both),
    "a routed layer patched": ("unfused_qwen2", _wrapped("experts", lambda y: 2 * y)),
    "a router patched": ("unfused_qwen2", _wrapped("gate", _first(lambda y: y.roll(1, -1)))),
    "a shared gate patched": ("unfused_qwen2", _wrapped("shared_expert_gate", _first(lambda y: y + 1))),
    "an activation patched": ("unfused_qwen2", _wrapped("shared_expert.act_fn", lambda y: y.clamp(max=0.1))),
    "an activation of its own": (
        "unfused_qwen2",
        _of_another_class("shared_expert.act_fn", lambda y: y.clamp(max=0.1)),
    ),
    "a list": ("list_moe", lambda block: None),
    "an expert's activation patched": ("list_moe", _wrapped("experts.3.act_fn", lambda y: y.clamp(max=0.1))),
    "an expert's linear layer patched": ("list_moe", _wrapped("experts.3.down_proj", _first(lambda y: 2 * y))),
    "a whole shared expert": ("list_moe_whole", lambda block: None),
    "a whole shared expert over the ranks": ("list_moe_whole", _changed(_whole_over_ranks)),
    "a whole shared expert in the sum": ("list_moe_whole", _changed(_whole_in_sum)),
    "a whole shared expert on one rank": ("list_moe_whole", _changed(_whole_on_first_rank)),
    "a whole shared expert summed apart": ("list_moe_whole", _changed(_summed_apart)),
}
BUILT |= {
    "fused": (FUSED, lambda block: None),
    "fused, and a residual": (FUSED, _changed(lambda block, x: _inside(block, x) + x)),
    "fused, and scaled": (FUSED, _changed(lambda block, x: 2.5 * _inside(block, x))),
    "fused, and the shared expert again": (
        FUSED,
        _changed(lambda block, x: _inside(block, x) + block.shared_expert(x)),
    ),
    "fused, of another input": (FUSED, _changed(lambda block, x: _inside(block, x, shared_experts_input=2 * x))),
    "fused, a scale in vLLM's layer": (FUSED, _scale_in_layer),
    "fused, the shared expert called otherwise": (FUSED, _called_otherwise),
    "fused, the shared expert summed inside": (FUSED, _summed_inside),
    "fused, the shared expert called by another class": (FUSED, _another_caller),
    "fused, its routed layer's method patched": (FUSED, _own_method("experts", "_maybe_reduce_final_output")),
    "fused, its experts' method patched": (FUSED, _own_method("experts.routed_experts.quant_method", "apply")),
    "fused, a shared gate patched": (FUSED, _wrapped("shared_expert_gate", _first(lambda y: y + 1))),
}
BUILT[SUMMED_LATER] = ("list_moe", _changed(_unsummed))
LOADED: dict[str, tuple[str, Change]] = {
    "patched after loading": ("unfused_qwen2", _changed(_twice)),
    "a scale set after loading": ("unfused_qwen2", _scale_in_layer),
    "fused, patched after loading": (FUSED, _changed(lambda block, x: 2 * _inside(block, x))),
    "fused, normed otherwise after loading": (FUSED, _other_norm),
    "fused, hooked after loading": (FUSED, _hooked),
}
"""Changes that a model makes to itself once its weights are loaded."""


def _register(number: int, kind: str, change: Change, *, loaded: bool) -> str:
    """An architecture whose blocks are changed."""
    from list_moe.model import ListMoeForCausalLM
    from unfused_moe.qwen2 import UnfusedQwen2MoeForCausalLM
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM

    parents = {"unfused_qwen2": UnfusedQwen2MoeForCausalLM, FUSED: Qwen2MoeForCausalLM}
    parent = parents.get(kind, ListMoeForCausalLM)

    def blocks(model: Any) -> None:
        for layer in model.model.layers:
            change(layer.mlp)

    class Variant(parent):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            if not loaded:
                blocks(self)

        def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
            names = super().load_weights(weights)
            if loaded:
                blocks(self)
            return names

    name = f"Variant{number}ForCausalLM"
    Variant.__name__ = Variant.__qualname__ = name
    ModelRegistry.register_model(name, Variant)
    return name


def _load(folder: Path, architecture: str, run: str | None, target: str = "auto") -> list[Any]:
    """The outputs of the first layer's block, loaded under surgery if there is a folder for its receipts."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model_loader

    from moe_surgery.engine.model.seam import disengage, engage
    from moe_surgery.engine.orders import Orders

    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        hf_overrides={"architectures": [architecture]},
    ).create_engine_config()
    if run is not None:
        engage(Orders(run, prove="all", target=target))
    try:
        with set_current_vllm_config(config):
            model = get_model_loader(config.load_config).load_model(config, config.model_config)
        outputs = []
        for tokens in TOKENS:
            x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens))
            with (
                torch.inference_mode(),
                set_current_vllm_config(config),
                set_forward_context(None, config, num_tokens=tokens),
            ):
                outputs.append(model.model.layers[0].mlp(x).clone())
        return outputs
    finally:
        disengage()


def main(folder: Path, out: Path, rank: int, world: int, port: int) -> None:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import get_tp_group, init_distributed_environment, initialize_model_parallel

    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(world)
    found: dict[str, dict[str, Any]] = {}
    variants = [*((name, *made, False) for name, made in BUILT.items()), *((n, *m, True) for n, m in LOADED.items())]
    for number, (name, kind, change, loaded) in enumerate(variants):
        architecture = _register(number, kind, change, loaded=loaded)
        place = folder / (CHECKPOINTS.get(kind) or kind)
        wanted = _load(place, architecture, None)
        run = out.parent / f"run{number}"
        run.mkdir(exist_ok=True)
        try:
            got = _load(place, architecture, str(run), "folded" if kind == FUSED else "auto")
        except Exception as error:
            found[name] = {"outcome": "failed", "reason": str(error)}
            continue
        [receipt] = [json.loads(file.read_text()) for file in run.glob(f"*-rank{get_tp_group().rank}-*.json")]
        site = receipt["report"]["sites"][0]
        if name == SUMMED_LATER:
            got, wanted = [[get_tp_group().all_reduce(y) for y in ys] for ys in (got, wanted)]
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))
        found[name] = {"outcome": site["outcome"], "reason": site["reason"], "apart": apart}
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
