"""The proof in an engine: each chosen block is asked as soon as its kernels are ready, before the first request.

vLLM brings expert weights into its kernels' layout module by module, and what lies in that layout can't be read any
more. So all that is to be known of a block's loaded weights is computed just before, and the block is asked just after:
no weights are copied, but for the small ones and, under tensor parallelism, those of other ranks. There every rank puts
the same whole weights together and asks the same questions in the same order; what a rank gets is the sum of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform

from moe_surgery.engine.model import in_e4m3
from moe_surgery.engine.model.agreement import Ranks
from moe_surgery.engine.model.kernel_block import KernelBlock
from moe_surgery.engine.model.layers import copies, owner
from moe_surgery.engine.model.routed import choose, matrices
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.errors import DeviceError
from moe_surgery.prove.ground import Ground, rehearse, survey
from moe_surgery.prove.probe import Probes, make_probes
from moe_surgery.prove.proof import prove_swapped
from moe_surgery.prove.settling import settle
from moe_surgery.prove.verdict import Verdict
from moe_surgery.report.outcomes import Step
from moe_surgery.spec import MoESpec
from moe_surgery.targets.vllm.runner import drop_shared_output
from moe_surgery.weights.layout import Layout, Piece
from moe_surgery.weights.tensors import BlockTensors, OwnRouting, weight

MOST_EXAMPLES = 2
SEED = 0


def to_prove(steps: Iterable[Step], *, everything: bool) -> tuple[str, ...]:
    """The paths of the blocks to prove: all, or of each kind the first and the last."""
    kinds: dict[object, list[str]] = {}
    for step in steps:
        if step.outcome == "replaced":
            kinds.setdefault((step.kind, step.spec, step.reason), []).append(step.path)
    chosen = [paths if everything else dict.fromkeys((paths[0], paths[-1])) for paths in kinds.values()]
    return tuple(path for paths in chosen for path in paths)


@dataclass(eq=False)
class Exam:
    """One block's proof. ``small`` are its loaded weights, whole, but for the experts'; ``verdict`` comes later.

    ``probes`` are being made on CPU threads meanwhile; of experts that clamp, they need the experts' weights too.
    """

    path: str
    spec: MoESpec
    small: BlockTensors
    ranks: Ranks
    probes: Future[Probes] | None
    ground: Ground | str = "its experts were never laid out"
    verdict: Verdict | None = None
    seconds: float = 0.0

    def rehearse(self) -> str | None:
        """Why tokens can't prove a block whose router is the model's own, by what that makes of them, if they can't."""
        assert self.probes is not None
        probes, reason = rehearse(self.spec, self.small, SEED, self.probes.result())
        self.probes = Future()
        self.probes.set_result(probes)
        return reason

    def ready(self, runner: Any) -> None:
        """Compute from the loaded weights all that is to be known of them."""
        probes = None if self.probes is None else self.probes.result()
        self.ground = survey(self.spec, _with_experts(self, runner), SEED, self.ranks.size, probes)

    def prove(self, block: nn.Module, runner: Any, config: VllmConfig) -> None:
        """Ask ``block``, which is around ``runner``."""
        ground, self.ground = self.ground, ""
        sizes = next((module.sizes_to_ask for module in block.modules() if isinstance(module, KernelBlock)), ())
        self.verdict = prove_swapped(asker(self.path, block, runner, config, self.ranks), ground, sizes=sizes)


def prepare(item: EngineSite, ranks: Ranks, pool: Executor) -> Exam:
    """Take copies of what must be known of a block before it is rebuilt and its weights are laid out anew."""
    assert item.reading is not None
    spec, layout, block = item.reading.spec, item.reading.layout, item.block
    small = _small(block, layout, _routing(item), ranks)
    if item.stored:
        small = replace(small, scales=in_e4m3.copied(block, item.experts, layout.shared, small.router.dtype))
    settle(small.router.device)  # the copies are made on this thread's stream
    probes = None if spec.experts.limit is not None else pool.submit(make_probes, spec, small.router, SEED, small)
    return Exam(item.site.path, spec, small, ranks, probes)


class Proof(Protocol):
    """The proof of one block: what it needs of the weights as they were loaded, and then what it asks.

    ``ready`` is called before vLLM lays out the experts of the new block's ``runner``, ``prove`` after that.
    """

    verdict: Verdict | None
    seconds: float

    @property
    def ranks(self) -> Ranks: ...
    def ready(self, runner: Any) -> None: ...
    def prove(self, block: nn.Module, runner: Any, config: VllmConfig) -> None: ...


def examine(
    proof: Proof,
    block: nn.Module,
    runner: Any,
    config: VllmConfig,
    kernels: Callable[[], None],
    judge: Callable[[], None],
) -> None:
    """Have ``block`` proven as soon as vLLM has laid out the experts of its ``runner``, and the verdict judged.

    ``kernels`` waits for those that blocks launch; no block is asked before.
    """
    method = runner.routed_experts.quant_method
    lay_out = method.process_weights_after_loading

    def lay_out_and_prove(layer: nn.Module) -> None:
        del method.process_weights_after_loading  # the instance's, which is this function
        started = time.perf_counter()
        proof.ready(runner)
        kernels()
        proof.seconds += time.perf_counter() - started
        lay_out(layer)
        started = time.perf_counter()
        with set_current_vllm_config(config):
            proof.prove(block, runner, config)
        proof.seconds += time.perf_counter() - started
        proof.ranks.stand()  # or the verdict is about what another rank didn't do
        judge()

    method.process_weights_after_loading = lay_out_and_prove


def asker(
    path: str, block: Callable[[Tensor], Any], runner: Any, config: VllmConfig, ranks: Ranks
) -> Callable[[Tensor], Tensor]:
    """The block at ``path`` around ``runner`` as the proof asks it: all ranks in step, in a forward of the engine's."""
    asked = 0

    def ask(x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        question, tokens = f"question {asked} to {path}", x.numel() // x.shape[-1]
        try:
            with (
                torch.inference_mode(),
                _uncompiled(),
                set_forward_context(None, config, num_tokens=tokens),
                ranks.summing(f"the answer to {question}"),
            ):
                out: Tensor = block(x.contiguous()).clone()
                settle(x.device)
        except BaseException as error:
            if runner is not None:
                drop_shared_output(runner)
            # A block may refuse a question, if it does so on all ranks.
            if isinstance(error, Exception) and not isinstance(error, DeviceError):
                ranks.meet(f"where {question} raised {type(error).__name__}: {error}")
            raise
        return out

    return ask


def _uncompiled() -> AbstractContextManager[object]:
    """On CPU the engine's graphs go through the whole block: an operator compiled by itself here would be thrown away.

    On a GPU they stop at the layer, and what is compiled within it is what will serve.
    """
    return torch.compiler.set_stance("force_eager") if current_platform.is_cpu() else nullcontext()


def _routing(item: EngineSite) -> OwnRouting | None:
    assert item.reading is not None
    if item.routed is None or item.reading.spec.router.scoring != "own":
        return None
    return partial(choose, item.routed.runner.router)


def _small(block: nn.Module, layout: Layout, routing: OwnRouting | None, ranks: Ranks) -> BlockTensors:
    """Router and shared expert, in full size, as copies; the experts are still empty, and of their dtype."""
    router = _matrix(block, layout.router)
    empty = weight(block, layout.experts[0].down.path).new_empty(0)
    shared = layout.shared
    return BlockTensors(
        router=router,
        w13=empty,
        w2=empty,
        shared_gate_proj=_rows(block, shared.gate, ranks) if shared else None,
        shared_up_proj=_rows(block, shared.up, ranks) if shared else None,
        shared_down_proj=_columns(block, shared.down, ranks) if shared else None,
        shared_gate=_matrix(block, layout.shared_gate) if layout.shared_gate else None,
        copied=True,
        routing=routing,
        router_bias=_vector(block, layout.router_bias),
        correction_bias=_vector(block, layout.correction_bias),
    )


def _with_experts(exam: Exam, runner: Any) -> BlockTensors:
    """The exam's tensors with the routed experts' loaded weights, as they are or put together from all ranks.

    What lies behind them is the shared expert, where it was folded.
    """
    experts, count, ranks = runner.routed_experts, exam.spec.experts.num_experts, exam.ranks
    w13, w2 = experts.w13_weight.data[:count], experts.w2_weight.data[:count]
    gate, up, down = (part[:count] for part in matrices(runner))
    if runner.moe_config.ep_size > 1:  # each rank has some of the experts, in their order
        w13 = ranks.gather(torch.cat([gate, up], dim=1), 0)
        w2 = ranks.gather(down, 0)
    elif ranks.size > 1 or (2 * gate.shape[1], gate.shape[2]) != w13.shape[1:]:
        w13 = torch.cat([ranks.gather(gate, 1), ranks.gather(up, 1)], dim=1)
        w2 = ranks.gather(down, 2)
    whole = replace(exam.small, w13=w13, w2=w2)
    if whole.scales is None:
        return whole
    held = in_e4m3.scales(experts, None)
    return replace(whole, scales=replace(whole.scales, w13=held.w13.data, w2=held.w2.data))


def _matrix(block: nn.Module, piece: Piece) -> Tensor:
    weight: Tensor = getattr(owner(block, piece), piece.path.rpartition(".")[2])
    return weight.detach().clone()


def _vector(block: nn.Module, piece: Piece | None) -> Tensor | None:
    return None if piece is None else weight(block, piece.path).reshape(-1).clone()


def _rows(block: nn.Module, piece: Piece, ranks: Ranks) -> Tensor:
    """A matrix whose rows may be shared out over the ranks."""
    weight, shares = _matrix(block, piece), ranks.size // copies(owner(block, piece))
    begin, end = piece.rows or (0, weight.shape[0] * shares)
    part = weight[begin // shares : end // shares]
    return ranks.gather(part, 0) if shares > 1 else part.clone()


def _columns(block: nn.Module, piece: Piece, ranks: Ranks) -> Tensor:
    """A matrix whose columns may be shared out over the ranks."""
    weight = _matrix(block, piece)
    return ranks.gather(weight, 1) if copies(owner(block, piece)) < ranks.size else weight
