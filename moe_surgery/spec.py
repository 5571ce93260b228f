"""What a sparse-MoE block computes, and nothing about how.

A :class:`MoESpec` stands between the models that can be read and the targets that can be built. It is also the ground
truth of the proof: the reference forward is computed from the spec and the weights alone.

For a token ``x`` of width H, with experts ``e`` of width I and a shared expert of width S::

    logits  = W_router x                                       [E]
    scores  = softmax(logits)  or  sigmoid(logits)             [E]
              or the weights that the model's own router gives, as it is
    ids     = the k experts of the highest scores
    w       = scores[ids]; w = w / sum(w) if renormalize; w = w * scale
    routed  = sum_j w[j] * W_down[ids[j]] (act(W_gate[ids[j]] x) * (W_up[ids[j]] x))
    shared  = g * scale_s * V_down (act(V_gate x) * (V_up x)),  g = sigmoid(W_g x) or 1
    out     = routed + shared
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Scoring = Literal["softmax", "sigmoid", "own"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Precision = Literal["native", "float32"]


@dataclass(frozen=True)
class RouterSpec:
    """How experts are chosen and weighted.

    ``logits_dtype`` and ``weights_dtype`` say whether the router's linear layer, and the routing weights as they meet
    the experts' outputs, are kept in the input's dtype ("native") or in float32. ``scores_dtype`` says the same of the
    scores themselves, which models keep in float32. With ``scoring`` "own" the model's own router runs as it is and
    hands over ids and weights; how it finds them is not said here.
    """

    num_experts: int
    top_k: int
    scoring: Scoring
    renormalize: bool
    scale: float = 1.0
    logits_dtype: Precision = "native"
    weights_dtype: Precision = "native"
    scores_dtype: Precision = "float32"


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts: ``num_experts`` gated MLPs of one width."""

    num_experts: int
    width: int
    activation: Activation


@dataclass(frozen=True)
class SharedSpec:
    """The shared expert: one gated MLP that every token visits, times ``gate`` and ``scale``."""

    width: int
    activation: Activation
    gate: Literal["sigmoid"] | None
    scale: float = 1.0


@dataclass(frozen=True)
class MoESpec:
    """A sparse-MoE block as a function of its input ``[..., hidden]``; it returns one tensor of the same shape."""

    hidden: int
    router: RouterSpec
    experts: ExpertsSpec
    shared: SharedSpec | None

    def sentence(self) -> str:
        """One line a person can read, stable enough to group sites by."""
        r, e, s = self.router, self.experts, self.shared
        parts = [f"{'its own' if r.scoring == 'own' else r.scoring} top-{r.top_k} of {r.num_experts}"]
        if r.renormalize:
            parts[0] += " renormalised"
        if r.scale != 1.0:
            parts[0] += f" ×{r.scale:g}"
        parts.append(f"experts {self.hidden}→{e.width} {e.activation}")
        if s is not None:
            gate = f", {s.gate} gate" if s.gate else ""
            scale = f", ×{s.scale:g}" if s.scale != 1.0 else ""
            parts.append(f"shared {s.width} {s.activation}{gate}{scale}")
        return " · ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MoESpec:
        shared = data["shared"]
        return cls(
            hidden=data["hidden"],
            router=RouterSpec(**data["router"]),
            experts=ExpertsSpec(**data["experts"]),
            shared=None if shared is None else SharedSpec(**shared),
        )
