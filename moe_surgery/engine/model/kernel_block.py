"""The block that computes with this library's kernels on a GPU, over the weights as vLLM holds them.

vLLM's routed layer, the router and the shared expert stay in the tree, under their names, and own their weights: these
are looked up at every call and nothing is derived from them, so loading them anew, or putting them to sleep, needs no
care here. All that depends on the number of tokens is inside of one operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from moe_surgery.engine.model.blocks import EngineBlock, SharedExpert
from moe_surgery.engine.model.crossover import SCHEMA, STORED_SCHEMA, sizes_to_ask, told
from moe_surgery.engine.model.in_e4m3 import form_of, matrix, scales
from moe_surgery.engine.model.layers import Held, first, owner
from moe_surgery.engine.model.routed import stored
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.errors import SurgeryError
from moe_surgery.kernels.arguments import BLOCK, Terms, Weights
from moe_surgery.kernels.arguments import SCHEMA as FOLDED_SCHEMA
from moe_surgery.read.reading import Reading
from moe_surgery.spec import RouterSpec
from moe_surgery.targets.base import Context
from moe_surgery.targets.folded.fitness import MOST_PAIRS, objections, outside
from moe_surgery.targets.folded.fold import terms_of
from moe_surgery.weights.layout import Piece

_AS_LOADED = ("TRITON", "BATCHED_TRITON", "VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")
"""vLLM's MoE backends that leave stacked weights as they were loaded; others shuffle them within the same shape."""


def not_on_kernels(item: EngineSite, config: VllmConfig) -> str | None:
    """Why a block that can be rebuilt can't be computed by this library's kernels, if it can't."""
    return next(_objections(item, config), None)


def _objections(item: EngineSite, config: VllmConfig) -> Iterator[str]:
    assert item.reading is not None and config.model_config is not None
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    spec = item.reading.spec
    if spec.router.own:  # vLLM's router hands over what it chose
        spec = replace(spec, router=RouterSpec(spec.router.num_experts, spec.router.top_k, "softmax", renormalize=True))
    for reason in (*objections(spec, Context("cuda", dtype)), *outside(spec, dtype)):
        yield reason
        return
    if envs.VLLM_BATCH_INVARIANT:
        yield "the kernels' sums depend on the number of tokens, and VLLM_BATCH_INVARIANT is set"
    told = (getattr(config, "aux_output_config", None), config.model_config)
    if any(getattr(holder, "enable_return_routed_experts", False) for holder in told):
        yield "the kernels don't say which experts they chose, and enable_return_routed_experts is set"
    backend = _backend(item, config)
    if backend not in _AS_LOADED:
        yield f"vLLM's MoE backend {backend} lays weights out in a way of its own; moe_backend='triton' doesn't"
    slices, left = divmod(_shared_width(item), _width(item.reading))
    if left:
        yield f"a rank's share of the shared expert is {left} wider than {slices} of the routed ones"
    if item.reading.spec.router.top_k + slices > MOST_PAIRS:
        yield f"{item.reading.spec.router.top_k} + {slices} experts for each token are more than {MOST_PAIRS}"
    router = _weight(item.block, item.reading.layout.router)
    needed = not item.reading.spec.router.own or bool(item.stored)  # else vLLM's layer alone looks at it
    if needed and tuple(router.shape) != (item.reading.spec.router.num_experts, item.reading.spec.hidden):
        yield f"{item.reading.layout.router} is a part of a weight"
    for piece in _small(item.reading, router=needed, shared=not item.stored):
        found = _weight(item.block, piece).dtype
        if found != config.model_config.dtype:
            yield f"{piece.path} is {str(found).removeprefix('torch.')}, the block {dtype}"


def _backend(item: EngineSite, config: VllmConfig) -> str:
    """What lays out the block's routed experts; for those that aren't in vLLM's layer yet, what is to be expected."""
    if item.routed is not None:
        return _layout(item.experts)
    wanted = config.kernel_config.moe_backend
    if wanted in ("auto", "humming"):  # the latter is for quantised experts
        return "TRITON" if torch.cuda.get_device_capability() < (10, 0) else "of this GPU"
    return str(wanted).upper()


def _layout(experts: Any) -> str:
    """The name of the backend that lays out routed experts of vLLM's."""
    method = experts.quant_method
    return str((method.unquantized_backend if stored(experts) is None else method.fp8_backend).name)


def terms_in_engine(item: EngineSite, shared_scale: float = 1.0) -> Terms:
    """A rank's share of the block in the kernels' numbers."""
    assert item.reading is not None
    spec = item.reading.spec
    terms = replace(
        terms_of(spec, given=spec.router.own),
        width=_width(item.reading),
        slices=_shared_width(item) // _width(item.reading),
        shared_scale=shared_scale,
        scaled=bool(item.stored),
        by_row=bool(item.stored) and _by_row(item),
    )
    if not spec.router.own:
        return terms
    return replace(terms, scale=float(spec.router.scale), gated=item.reading.layout.shared_gate is not None)


def _by_row(item: EngineSite) -> bool:
    """Whether a quantised block's weights have a scale for each row."""
    form = form_of(item.experts)
    return form is not None and form.rows == 1


def _width(reading: Reading) -> int:
    """Of a rank's share of a routed expert."""
    return reading.spec.experts.width // int(get_tensor_model_parallel_world_size())


def _shared_width(item: EngineSite) -> int:
    """Of what a rank computes of the shared expert; 0 if there is none."""
    assert item.reading is not None
    shared = item.reading.layout.shared
    return 0 if shared is None else int(_weight(item.block, shared.down).shape[-1])


def _small(reading: Reading, *, router: bool, shared: bool) -> Iterator[Piece]:
    """The weights of a block but for the routed experts', with ``router`` and ``shared`` expert if they are wanted."""
    layout = reading.layout
    if router:
        yield layout.router
    if shared and layout.shared is not None:
        yield from layout.shared.pieces()
    if layout.shared_gate is not None:
        yield layout.shared_gate


def _weight(block: nn.Module, piece: Piece) -> Tensor:
    weight: Tensor = getattr(owner(block, piece), piece.path.rpartition(".")[2])
    return weight


_Operator = Callable[[Tensor, Weights, Terms], Tensor]


def _operators(terms: Terms, dtype: torch.dtype) -> tuple[_Operator, _Operator, str]:
    """What computes a block, for eager calls and in graphs, and the latter's schema: with vLLM's experts or without."""
    if told(terms, dtype) is None:
        from moe_surgery.kernels.op import compute, folded_moe  # needs Triton

        return compute, folded_moe, FOLDED_SCHEMA
    from moe_surgery.engine.model.crossing_op import compute_in_engine, engine_moe

    return compute_in_engine, engine_moe, SCHEMA


class KernelBlock(EngineBlock):
    """A sparse-MoE block of an engine in one operator: tokens [T, H] to [T, H], summed over the ranks."""

    def __init__(
        self,
        item: EngineSite,
        router: str,
        name: str,
        runner: nn.Module,
        logits: nn.Module | None,
        shared: SharedExpert | None,
    ) -> None:
        """As for :class:`EngineBlock`; ``shared`` is what the routed layer was given as its shared expert.

        Raises :class:`SurgeryError` if the routed layer doesn't hold its weights as the kernels take them.
        """
        assert item.reading is not None
        super().__init__(item.site.module, router, name, runner, logits)
        self.label = "folded, moe-surgery kernels"
        piece = item.reading.layout.router
        holder, _, weight = piece.path.rpartition(".")
        # A weight of the old block itself is one of this block now.
        self._router_weight = Held(item.block.get_submodule(holder) if holder else self, weight)
        self._shared = (shared,)  # not a child, or its weights would have two names
        self._ranks = int(get_tensor_model_parallel_world_size())
        self.terms = terms_in_engine(item, 1.0 if shared is None else shared.factor)
        self._check()
        self._layer_name = str(runner.layer_name)
        self._dtype: torch.dtype = getattr(self, self._routed).routed_experts.params_dtype
        self._vllm: bool | None = None
        if self._by_layer:
            from moe_surgery.engine.model.stored_op import compute_stored, engine_stored_moe  # needs Triton

            self._of_stored, self._of_stored_in_graphs, self.schema = compute_stored, engine_stored_moe, STORED_SCHEMA
        else:
            self._compute, self._operator, self.schema = _operators(self.terms, self._dtype)

    @property
    def _by_layer(self) -> bool:
        """Whether vLLM's layer is needed beside the kernels: its router, or all of it over quantised weights."""
        return self.terms.scaled or self.terms.given

    @property
    def sizes_to_ask(self) -> tuple[int, ...]:
        """See :func:`~moe_surgery.engine.model.crossover.sizes_to_ask`."""
        return sizes_to_ask(self.terms, self._dtype)

    def weights(self) -> Weights:
        """The block's weights, where they are now."""
        experts: Any = getattr(self, self._routed).routed_experts
        w13, w2 = experts.w13_weight, experts.w2_weight
        # Where vLLM's router chooses, this one is looked at for its dtype alone.
        router = w13 if self.terms.given and not self.terms.scaled else self._router_weight()
        shared: Any = self._shared[0]
        held = scales(experts, shared) if self.terms.scaled else None
        if shared is None:
            return Weights(router, w13, w2, scales=held)
        return Weights(
            router,
            w13,
            w2,
            None if shared.gate is None else shared.gate.weight,
            matrix(shared.gate_up),
            None if shared.up is None else matrix(shared.up),
            matrix(shared.down),
            scales=held,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self._by_layer:
            out = self._beside_layer(x)
        else:
            operator = self._operator if torch.compiler.is_compiling() else self._compute
            out = operator(x, self.weights(), self.terms)
        if self._ranks > 1:
            out = tensor_model_parallel_all_reduce(out)  # last, and outside: vLLM fuses it with the norm that follows
        return out.view(hidden_states.shape)

    def _beside_layer(self, x: Tensor) -> Tensor:
        """The output over quantised weights, or behind vLLM's router, which has the logits of the block's own layer."""
        runner: Any = getattr(self, self._routed)
        logits = None
        if self.terms.given:
            gate = getattr(self, self._router) if self._router else runner.gate
            logits = first(gate(x))
        if torch.compiler.is_compiling():
            return self._of_stored_in_graphs(x, logits, self.weights(), self.terms, self._layer_name)
        return self._of_stored(x, logits, self.weights(), self.terms, runner, self._vllm)

    @contextmanager
    def always(self, *, vllm: bool) -> Iterator[None]:
        """While this lasts, quantised weights are computed with by vLLM's layer, or by the kernels, for any number of
        tokens: so each of the two can be asked about all."""
        self._vllm = vllm
        try:
            yield
        finally:
            self._vllm = None

    def _check(self) -> None:
        weights, t = self.weights(), self.terms
        experts: Any = getattr(self, self._routed).routed_experts
        if (backend := _layout(experts)) not in _AS_LOADED:
            raise SurgeryError(
                f"vLLM's MoE backend {backend} lays weights out in a way of its own; set moe_backend='triton'"
            )
        rows = t.slices * t.width * (1 if weights.shared_up is not None else 2)
        wanted: dict[str, tuple[int, ...] | None] = {
            "w13": (t.experts, 2 * t.width, t.hidden),
            "w2": (t.experts, t.hidden, t.width),
            "gate": (1, t.hidden) if t.gated else None,
            "shared_gate": (rows, t.hidden) if t.slices else None,
            "shared_up": (rows, t.hidden) if weights.shared_up is not None else None,
            "shared_down": (t.hidden, t.slices * t.width) if t.slices else None,
        }
        if weights.router is not weights.w13:
            wanted["router"] = (t.experts, t.hidden)
        held = {name: getattr(weights, name) for name in wanted}
        if weights.scales is not None:
            scaled = _rows if t.by_row else _blocks
            wanted |= {f"scales of {name}": scaled(wanted[name]) for name in weights.scales._fields}
            held |= {f"scales of {name}": scale for name, scale in weights.scales._asdict().items()}
        for name, shape in wanted.items():
            tensor: Tensor | None = held[name]
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape or (tensor is not None and not tensor.is_contiguous()):
                raise SurgeryError(f"{name} lies in memory as {found}, and the kernels take {shape}, contiguous")


def _blocks(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """How many blocks matrices of ``shape`` [..., N, K] have."""
    return None if shape is None else (*shape[:-2], shape[-2] // BLOCK, shape[-1] // BLOCK)


def _rows(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The scales of rows of matrices of ``shape``."""
    return None if shape is None else (*shape[:-1], 1)
