"""Building the fused layer of one block, out of the loaded block that it replaces."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.platforms import current_platform

from moe_surgery.engine.model.blocks import (
    Absorbed,
    EngineBlock,
    Place,
    RouterLogits,
    SharedExpert,
)
from moe_surgery.engine.model.few_tokens import FewTokensRunner, unsorted_for_few
from moe_surgery.engine.model.folded_router import Chosen, FoldedLogits
from moe_surgery.engine.model.kernel_block import KernelBlock
from moe_surgery.engine.model.layer_book import LayerBook
from moe_surgery.engine.model.layers import copies, is_linear, owner, owner_path
from moe_surgery.engine.model.routed import Routed, matrices, stored
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.read.beside import Pair
from moe_surgery.read.reading import Reading
from moe_surgery.spec import MoESpec
from moe_surgery.targets.routing import Routing
from moe_surgery.targets.shared_as_experts import slices
from moe_surgery.targets.vllm.folded_routing import Choose, FoldedRouting, folded
from moe_surgery.targets.vllm.runner import construct
from moe_surgery.weights.layout import MLPPieces, Piece
from moe_surgery.weights.tensors import weight


@dataclass(frozen=True, eq=False)
class Built:
    """What replaces a site's block, and what replaces the shared expert beside it, if it was there."""

    block: EngineBlock
    absorbed: Absorbed | None

    def modules(self, item: EngineSite) -> dict[str, nn.Module]:
        """The new modules by their paths in the model."""
        return dict(zip(item.places(), (self.block, self.absorbed), strict=False))  # type: ignore[arg-type]

    def whole(self, item: EngineSite) -> nn.Module:
        """What computes now what the site's block did, with the shared expert beside it."""
        if self.absorbed is None:
            return self.block
        name, other = (path.rpartition(".")[2] for path in item.places())
        return Pair(name, self.block, other, self.absorbed)


def build(item: EngineSite, book: LayerBook, *, fold: bool = False) -> Built:
    """What replaces ``item``'s block, whose weights are loaded and not yet in any kernel's layout.

    Routed experts that lie in vLLM's layer already stay where they are. Those of single MLPs, and all if the shared
    expert comes among them, are copied into a new layer: one block of extra memory, until the old block goes. The
    old block can't be used afterwards. With ``fold`` the shared expert is among them on a CPU; on a GPU this library's
    kernels compute with the weights that vLLM's layer and the shared expert hold.
    """
    copied = fold and not current_platform.is_cuda()
    block = _folded_block(item, book) if copied else _layer_block(item, book, fold=fold)
    built = Built(block, None if item.pair is None else Absorbed(item.pair.other, folded=copied))
    whole = built.whole(item)
    for module in whole.modules():
        if isinstance(module, (RouterLogits, SharedExpert)):
            for place in module.places:
                place.move(whole)
    return built


def _folded_block(item: EngineSite, book: LayerBook) -> EngineBlock:
    reading = item.reading
    assert reading is not None
    logits = FoldedLogits(item.block, reading)
    book.release(item.block)
    child, runner = _folded(item, reading)
    return EngineBlock(item.site.module, "", child, runner, logits, without=_held_by_shared(reading))


def _layer_block(item: EngineSite, book: LayerBook, *, fold: bool) -> EngineBlock:
    reading, block = item.reading, item.block
    assert reading is not None
    shared = None if reading.spec.shared is None else SharedExpert(block, reading)
    book.release(block)
    gate, router = _router(item)
    if item.routed is None:
        child, name, like, mlps = _experts(item, reading)
        runner = _filled(reading.spec, like, name, shared, _routing(block, reading, like.dtype), mlps)
    else:
        child, runner = item.inside(item.routed.path), _regrouped(block, item.routed, reading, shared)
    if fold:
        return KernelBlock(item, router, child, runner, gate, shared)
    return EngineBlock(item.site.module, router, child, runner, gate)


def _router(item: EngineSite) -> tuple[nn.Module | None, str]:
    """The module that computes the logits, if it isn't the block's own, and the name of the child that does."""
    assert item.reading is not None
    if item.routed is not None and item.routed.routes != "given" and item.routed.runner.gate is not None:
        return None, ""
    piece, spec = item.reading.layout.router, item.reading.spec
    layer, (child, *rest) = owner(item.block, piece), item.inside(piece.path).split(".")
    wide = spec.router.logits_dtype == "float32"
    if is_linear(layer) and rest == ["weight"] and not wide:
        return None, child
    # The router does more than give logits, or lies deeper; its weight is all that is needed of it.
    return RouterLogits(Place(item.block, owner_path(piece)), piece.path.rpartition(".")[2], wide), ""


def _regrouped(block: nn.Module, routed: Routed, reading: Reading, shared: nn.Module | None) -> MoERunner:
    """vLLM's runner anew, around the experts that the old one had, with the shared expert inside."""
    old, spec = routed.runner, reading.spec.router
    # Of quantised experts the layout may still change the sizes in it, and the kernel is made from it.
    config = copy.copy(old.moe_config) if stored(old.routed_experts) is None else old.moe_config
    config.skip_final_all_reduce = False
    router, scale = old.router, spec.scale
    if routed.routes == "given":
        routing = _routing(block, reading, old.routed_experts.params_dtype)  # applies the scale itself
        router, scale = (
            create_fused_moe_router(
                top_k=spec.top_k,
                global_num_experts=spec.num_experts,
                renormalize=spec.renormalize,
                custom_routing_function=routing,
            ),
            1.0,
        )
        old.routed_experts.custom_routing_function = routing
    kind = FewTokensRunner if unsorted_for_few(old) else MoERunner
    return kind(
        layer_name=old.layer_name,
        moe_config=config,
        router=router,
        routed_experts=old.routed_experts,
        enable_dbo=old.enable_dbo,
        gate=old.gate,
        shared_experts=shared,
        routed_scaling_factor=scale,
    )


def _routing(block: nn.Module, reading: Reading, dtype: torch.dtype) -> Routing:
    correction = reading.layout.correction_bias
    return Routing(reading.spec.router, dtype, None if correction is None else weight(block, correction.path))


def _folded(item: EngineSite, reading: Reading) -> tuple[str, MoERunner]:
    """The child that holds the routed experts, and a new runner with the shared expert among them."""
    block, spec = item.block, reading.spec
    child, name, like, mlps = _experts(item, reading)
    inner: Choose = _routing(block, reading, like.dtype)
    if item.routed is not None and item.routed.routes != "given":
        inner = Chosen(item.routed.runner, spec.router.scale)
    routing = FoldedRouting.of(spec, inner)
    return child, _filled(folded(spec), like, name, None, routing, chain(mlps, _slices(block, reading)))


Shares = tuple[Tensor, Tensor, Tensor]
"""A rank's share of an MLP: gate and up [width, H], down [H, width]."""


def _experts(item: EngineSite, reading: Reading) -> tuple[str, str, Tensor, Iterator[Shares]]:
    """The child that holds the routed experts, the name of their layer, one of their weights, and all of them."""
    if item.routed is not None:
        runner = item.routed.runner
        mlps = zip(*matrices(runner), strict=True)
        return item.inside(item.routed.path), runner.layer_name, runner.routed_experts.w2_weight, mlps
    block, layout = item.block, reading.layout
    width = reading.spec.experts.width // get_tensor_model_parallel_world_size()
    child = item.inside(layout.experts[0].gate.path).split(".")[0]
    like = owner(block, layout.experts[0].down).weight
    assert isinstance(like, Tensor)
    return child, f"{item.site.path}.{child}", like, (own_share(block, mlp, width) for mlp in layout.experts)


def _slices(block: nn.Module, reading: Reading) -> Iterator[Shares]:
    """The shared expert in pieces as wide as a routed one. Which rows a rank holds makes no difference to the sum."""
    count, ranks = slices(reading.spec), get_tensor_model_parallel_world_size()
    width = reading.spec.experts.width // ranks
    assert reading.layout.shared is not None
    gate, up, down = own_share(block, reading.layout.shared, count * width)
    return zip(gate.split(width), up.split(width), down.split(width, dim=1), strict=True)


def _held_by_shared(reading: Reading) -> frozenset[str]:
    """The children that hold nothing but the shared expert's matrices, which have moved."""
    layout = reading.layout
    assert layout.shared is not None
    others = replace(layout, shared=None).paths()
    mine = {piece.path.split(".")[0] for piece in layout.shared.pieces()}
    return frozenset(mine - {path.split(".")[0] for path in others})


def _filled(
    spec: MoESpec,
    like: Tensor,
    name: str,
    shared: nn.Module | None,
    routing: Routing | FoldedRouting,
    mlps: Iterable[Shares],
) -> MoERunner:
    """A new runner of vLLM's for ``spec``, on the device and in the dtype of ``like``, filled from single MLPs."""
    with torch.device(like.device):
        runner: MoERunner = construct(spec, like.dtype, name, shared, routing)
    gates, ups, downs = matrices(runner)
    with torch.no_grad():
        for whole in (runner.routed_experts.w13_weight, runner.routed_experts.w2_weight):
            whole.zero_()  # rows that only fill up to what the kernels take
        for expert, (gate, up, down) in enumerate(mlps):
            gates[expert].copy_(gate)
            ups[expert].copy_(up)
            downs[expert].copy_(down)
    return runner


def own_share(block: nn.Module, mlp: MLPPieces, width: int) -> Shares:
    """This rank's share of an MLP's loaded weights."""
    start = get_tensor_model_parallel_rank() * width

    def rows(piece: Piece) -> Tensor:
        layer = owner(block, piece)
        weight = _weight(layer, piece)
        if copies(layer) > 1:  # every rank holds the whole
            begin = (piece.rows[0] if piece.rows else 0) + start
        else:
            begin = piece.rows[0] // getattr(layer, "tp_size", 1) if piece.rows else 0
        return weight[begin : begin + width]

    layer = owner(block, mlp.down)
    down = _weight(layer, mlp.down)
    return rows(mlp.gate), rows(mlp.up), down[:, start : start + width] if copies(layer) > 1 else down


def _weight(layer: nn.Module, piece: Piece) -> Tensor:
    weight = getattr(layer, piece.path.rpartition(".")[2]).detach()
    return weight if piece.index is None else weight[piece.index]
