"""The proof of a block that holds quantised weights: by what its old form is seen to compute.

Whatever its layers are stored as, they stay the same objects, and once vLLM has laid them out both forms of the block
can be asked. So the old one is asked, and what its routed layer, its shared expert and that one's gate answer meanwhile
is the reference (:mod:`moe_surgery.prove.combination`). For that time it is put back as it was: registered under its
name, and with the sums over the ranks that it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import RowParallelLinear

from moe_surgery.engine.model.agreement import Ranks
from moe_surgery.engine.model.layers import Sums, first, owner, set_sums, sums_of
from moe_surgery.engine.model.proving import SEED, asker
from moe_surgery.engine.model.sites import EngineSite
from moe_surgery.prove.asking import Misconduct, Refused
from moe_surgery.prove.combination import Observed, Parts, make_tokens, prove_combination, shake
from moe_surgery.prove.verdict import Verdict


@dataclass(eq=False)
class Observation:
    """One block's proof by its parts; ``verdict`` comes once its experts are laid out. See :func:`observe`."""

    item: EngineSite
    ranks: Ranks
    routed: MoERunner
    down: Any
    gate: nn.Module | None
    sums: Sums
    verdict: Verdict | None = None
    seconds: float = 0.0

    def ready(self, runner: Any) -> None:
        """Nothing is computed from its weights."""

    def prove(self, block: nn.Module, runner: Any, config: VllmConfig) -> None:
        """Ask both the old block and ``block``, which is around ``runner`` and registered."""
        assert self.item.reading is not None
        spec, experts = self.item.reading.spec, runner.routed_experts
        like = experts.params_dtype, next(experts.parameters()).device
        self.verdict = prove_combination(
            self._observed(config),
            asker(self.item.site.path, block, runner, config, self.ranks),
            spec,
            make_tokens(spec.hidden, *like, SEED),
            inside=float(self.routed.routed_scaling_factor),
            ranks=self.ranks.size,
            sizes=getattr(runner, "sizes_to_ask", ()),
        )

    def _observed(self, config: VllmConfig) -> Observed:
        seen: dict[nn.Module, Tensor] = {}
        ask = asker(self.item.site.path, self.item.block, self.routed, config, self.ranks)
        # What every rank has a part of.
        config_ = self.routed.moe_config
        routed_out = self.sums[0] and config_.tp_size * config_.ep_size > 1
        partial = {self.routed: routed_out, self.down: self._shared_out()}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            seen[module] = first(output).detach().clone()  # the block may add to it in place

        def whole(module: nn.Module) -> Tensor:
            if module not in seen:
                raise Misconduct(f"doesn't call its {type(module).__name__}")
            part = seen[module]
            return part if not partial.get(module) else self.ranks.gather(part[None], 0).double().sum(0)

        def rounded_otherwise(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return shake(args[0]), *args[1:]

        def observed(x: Tensor, *, shaken: bool) -> Parts:
            seen.clear()
            with ExitStack() as ends:
                ends.enter_context(self._as_it_was(config))
                for module in (self.routed, self.down, *((self.gate,) if self.gate is not None else ())):
                    ends.callback(module.register_forward_hook(note).remove)
                if shaken:
                    ends.callback(self.down.register_forward_pre_hook(rounded_otherwise).remove)
                try:
                    output = ask(x.reshape(-1, x.shape[-1]))
                except Exception as error:
                    raise Refused(f"raised {type(error).__name__} ({error})") from error
            gate = None if self.gate is None else whole(self.gate)
            return Parts(output, whole(self.routed), whole(self.down), gate)

        return observed

    def _shared_out(self) -> bool:
        return isinstance(self.down, RowParallelLinear) and self.down.tp_size > 1 and not self.sums[1]

    @contextmanager
    def _as_it_was(self, config: VllmConfig) -> Iterator[None]:
        """While this lasts, the old block computes what it did before another was built from its parts."""
        layers = config.compilation_config.static_forward_context
        name = self.routed.layer_name
        new, sums = layers[name], sums_of(self.routed, self.down)
        layers[name] = self.routed
        set_sums(self.routed, self.down, self.sums)
        try:
            yield
        finally:
            layers[name] = new
            set_sums(self.routed, self.down, sums)


def observe(item: EngineSite, ranks: Ranks) -> Observation:
    """Take note of what is to be known of a block before another is built from its parts."""
    assert item.routed is not None and item.reading is not None
    shared, gate = item.reading.layout.shared, item.reading.layout.shared_gate
    assert shared is not None
    runner, down = item.routed.runner, owner(item.block, shared.down)
    asked = None if gate is None else owner(item.block, gate)
    return Observation(item, ranks, runner, down, asked, sums_of(runner, down))
